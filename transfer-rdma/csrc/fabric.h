/*
 * libfabric for reads of remote memory, in calls that a program can bind to: most of libfabric's own
 * API is inline code over tables of functions. Owns the objects and the order in which they close;
 * decides nothing (who reads what, deadlines, what an error means: the Rust side).
 *
 *   domain  a provider on one device; memory is registered with it
 *   endpoint  reads, or is read from; one thread at a time uses it (fabric_endpoint_address and
 *             fabric_register may be called from others)
 *   region  registered memory
 *
 * Calls return 0 or a negative errno of libfabric, and then `error` is filled in.
 */
#ifndef ANABRANCH_FABRIC_H
#define ANABRANCH_FABRIC_H

#include <stddef.h>
#include <stdint.h>

struct fabric_error {
	int32_t code;         /* libfabric's errno, positive */
	char text[252];       /* which call failed and why, NUL-terminated */
};

/* What was negotiated with the provider. */
struct fabric_facts {
	char provider[64];
	char domain[64];
	uint32_t version;         /* of the library: major << 16 | minor */
	uint32_t address_format;  /* two endpoints can talk only if this is equal */
	uint64_t max_read_bytes;  /* per read */
	uint32_t max_reads;       /* outstanding per endpoint */
	uint32_t key_bytes;       /* of a region's key, at most 8 */
	uint8_t address_by_virtual; /* reads name the peer's virtual address, not an offset */
	uint8_t key_by_provider;  /* the provider chooses the keys */
	uint8_t register_local;   /* memory that a read fills must be registered too */
	uint8_t region_by_endpoint; /* a region belongs to an endpoint, not to the domain */
};

enum fabric_access {
	FABRIC_READ_BY_PEERS = 0,
	FABRIC_FILLED_BY_READS = 1,
};

struct fabric_domain;
struct fabric_endpoint;
struct fabric_region;

/* Loads libfabric.so.1, or what ANABRANCH_LIBFABRIC names, if that was not done yet. */
int fabric_load(struct fabric_error *error);

/* `provider`: as libfabric names it, or NULL for its choice (FI_PROVIDER narrows it). `node`: the
 * numeric address of the interface, or NULL. `basic` asks for the registration that most hardware needs
 * (virtual addresses, the provider's keys, local memory registered) even of a provider that needs less. */
int fabric_domain_open(const char *provider, const char *node, int basic,
		       struct fabric_domain **out, struct fabric_facts *facts,
		       struct fabric_error *error);
/* After all its endpoints and regions. */
void fabric_domain_close(struct fabric_domain *domain);

int fabric_endpoint_open(struct fabric_domain *domain, struct fabric_endpoint **out,
			 struct fabric_error *error);
/* Ends its reads: their memory is written no more once this returned 0. After the regions that were
 * registered with it. */
int fabric_endpoint_close(struct fabric_endpoint *endpoint, struct fabric_error *error);

/* Its own address, for peers; `len` is the room in `out` and then the length. */
int fabric_endpoint_address(struct fabric_endpoint *endpoint, void *out, size_t *len,
			    struct fabric_error *error);
/* Makes a peer known; reads name it by `*peer`. */
int fabric_endpoint_insert(struct fabric_endpoint *endpoint, const void *address, size_t len,
			   uint64_t *peer, struct fabric_error *error);

/* `endpoint` counts only where `region_by_endpoint`. `key` is a wish unless `key_by_provider`. */
int fabric_register(struct fabric_domain *domain, struct fabric_endpoint *endpoint, void *at,
		    size_t len, enum fabric_access access, uint64_t key,
		    struct fabric_region **out, struct fabric_error *error);
uint64_t fabric_region_key(const struct fabric_region *region);
/* Peers' reads of it fail from here on. */
void fabric_region_close(struct fabric_region *region);

/* Starts a read of `len` bytes into `into`; `local` is its region where `register_local`, else NULL.
 * Returns 1 if it cannot start now (all slots taken, still connecting): poll, wait, and try again. */
int fabric_read(struct fabric_endpoint *endpoint, void *into, size_t len,
		const struct fabric_region *local, uint64_t peer, uint64_t at, uint64_t key,
		uint64_t tag, struct fabric_error *error);
/* Makes progress, on both ends; returns how many reads completed, their tags in `tags`. */
int fabric_poll(struct fabric_endpoint *endpoint, uint64_t *tags, size_t room,
		struct fabric_error *error);
/* Until there may be something to poll, `timeout_ms` at most, and less while a connection is made (no
 * provider wakes anybody for that). Returns 1 if the peer of the connected
 * socket `watched` (or -1) hung up. */
int fabric_wait(struct fabric_endpoint *endpoint, int watched, int timeout_ms);

#endif
