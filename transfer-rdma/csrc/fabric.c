/* See fabric.h. Order of writes to remote or local memory is never relied on: a read counts when its own
 * completion came. */
#define _GNU_SOURCE
#include "fabric.h"

#include <dlfcn.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#define LIBRARY "libfabric.so.1"
#define LIBRARY_VARIABLE "ANABRANCH_LIBFABRIC"
/* Reads outstanding per endpoint; a chunk needs a few. */
#define MAX_READS 64
#define POLL_BATCH 16
/* Between polls of a provider whose completions cannot be waited for. */
#define NAP_NS 20000

/* Ways of registering that this code can follow; the provider clears those that it does not need. */
#define MODES (FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT)

/* The structs of the headers are those of this version of the symbols. */
#define ABI "FABRIC_1.3"

static struct {
	int (*getinfo)(uint32_t version, const char *node, const char *service, uint64_t flags,
		       const struct fi_info *hints, struct fi_info **info);
	struct fi_info *(*dupinfo)(const struct fi_info *info);
	void (*freeinfo)(struct fi_info *info);
	int (*fabric)(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *context);
	const char *(*strerror)(int errnum);
	uint32_t (*version)(void);
	char failure[200];
} lib;

struct fabric_domain {
	struct fi_info *info;
	struct fid_fabric *fabric;
	struct fid_domain *domain;
};

/* What a read's completion points at. The provider may use `context` while the read runs. */
struct slot {
	struct fi_context2 context; /* first: the completion's address is the slot's */
	uint64_t tag;
	struct slot *next_free;
};

struct fabric_endpoint {
	struct fabric_domain *domain;
	struct fid_av *av;
	struct fid_cq *cq;
	struct fid_ep *ep;
	int wait_fd; /* -1: completions must be polled for */
	int refused; /* the provider took no read when last asked */
	int reads;   /* outstanding */
	struct slot *free;
	struct slot slots[MAX_READS];
};

struct fabric_region {
	struct fid_mr *mr;
};

/* === errors === */

static int fail(struct fabric_error *error, const char *call, int code)
{
	int positive = code < 0 ? -code : code;
	error->code = positive;
	snprintf(error->text, sizeof(error->text), "%s: %s", call,
		 lib.strerror ? lib.strerror(positive) : "the library is not loaded");
	return -positive;
}

/* === the library === */

/* Newer libraries keep the symbols of older structs; an unversioned one is a build of its own. */
static void *symbol(void *library, const char *name, const char *abi)
{
	void *found = dlvsym(library, name, abi);
	if (!found)
		found = dlsym(library, name);
	if (!found)
		snprintf(lib.failure, sizeof(lib.failure), "%s has no %s", LIBRARY, name);
	return found;
}

static void load(void)
{
	/* Some vendors install theirs where the loader does not look. */
	const char *named = getenv(LIBRARY_VARIABLE);
	void *library = dlopen(named && *named ? named : LIBRARY, RTLD_NOW | RTLD_LOCAL);
	if (!library) {
		const char *why = dlerror();
		snprintf(lib.failure, sizeof(lib.failure), "%s", why ? why : LIBRARY " did not load");
		return;
	}
	*(void **)&lib.getinfo = symbol(library, "fi_getinfo", ABI);
	*(void **)&lib.dupinfo = symbol(library, "fi_dupinfo", ABI);
	*(void **)&lib.freeinfo = symbol(library, "fi_freeinfo", ABI);
	*(void **)&lib.fabric = symbol(library, "fi_fabric", "FABRIC_1.1");
	*(void **)&lib.strerror = symbol(library, "fi_strerror", "FABRIC_1.0");
	*(void **)&lib.version = symbol(library, "fi_version", "FABRIC_1.0");
}

int fabric_load(struct fabric_error *error)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, load);
	if (!lib.failure[0])
		return 0;
	error->code = FI_ENOENT;
	snprintf(error->text, sizeof(error->text), "%s", lib.failure);
	return -FI_ENOENT;
}

/* === domain === */

static struct fi_info *hints_for(const char *provider, int basic)
{
	struct fi_info *hints = lib.dupinfo(NULL);
	if (!hints)
		return NULL;
	hints->ep_attr->type = FI_EP_RDM;
	hints->caps = FI_MSG | FI_RMA | FI_READ | FI_REMOTE_READ;
	hints->mode = FI_CONTEXT | FI_CONTEXT2;
	hints->domain_attr->mr_mode = basic ? FI_MR_BASIC : MODES;
	/* Endpoints of one domain are used by as many threads. */
	hints->domain_attr->threading = FI_THREAD_SAFE;
	if (provider) {
		hints->fabric_attr->prov_name = strdup(provider);
		if (!hints->fabric_attr->prov_name) {
			lib.freeinfo(hints);
			return NULL;
		}
	}
	return hints;
}

static int find(struct fabric_domain *domain, const char *provider, const char *node, int basic,
		struct fabric_error *error)
{
	struct fi_info *hints = hints_for(provider, basic);
	if (!hints)
		return fail(error, "fi_dupinfo", FI_ENOMEM);
	uint64_t flags = node ? FI_SOURCE | FI_NUMERICHOST : 0;
	int code = lib.getinfo(FI_VERSION(1, 11), node, NULL, flags, hints, &domain->info);
	lib.freeinfo(hints);
	return code ? fail(error, "fi_getinfo", code) : 0;
}

/* FI_MR_BASIC is the older name of a set of modes. */
static int mode_of(const struct fi_info *info)
{
	int mode = info->domain_attr->mr_mode;
	if (mode == FI_MR_BASIC)
		return FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
	return mode;
}

static void tell(const struct fi_info *info, struct fabric_facts *facts)
{
	int mode = mode_of(info);
	memset(facts, 0, sizeof(*facts));
	snprintf(facts->provider, sizeof(facts->provider), "%s", info->fabric_attr->prov_name);
	snprintf(facts->domain, sizeof(facts->domain), "%s", info->domain_attr->name);
	facts->version = lib.version();
	facts->address_format = info->addr_format;
	facts->max_read_bytes = info->ep_attr->max_msg_size;
	size_t reads = info->tx_attr->size;
	facts->max_reads = reads && reads < MAX_READS ? reads : MAX_READS;
	facts->key_bytes = info->domain_attr->mr_key_size;
	facts->address_by_virtual = (mode & FI_MR_VIRT_ADDR) != 0;
	facts->key_by_provider = (mode & FI_MR_PROV_KEY) != 0;
	facts->register_local = (mode & FI_MR_LOCAL) != 0;
	facts->region_by_endpoint = (mode & FI_MR_ENDPOINT) != 0;
}

int fabric_domain_open(const char *provider, const char *node, int basic,
		       struct fabric_domain **out, struct fabric_facts *facts,
		       struct fabric_error *error)
{
	int code = fabric_load(error);
	if (code)
		return code;
	struct fabric_domain *domain = calloc(1, sizeof(*domain));
	if (!domain)
		return fail(error, "calloc", FI_ENOMEM);
	code = find(domain, provider, node, basic, error);
	if (!code && (code = lib.fabric(domain->info->fabric_attr, &domain->fabric, NULL)))
		code = fail(error, "fi_fabric", code);
	if (!code && (code = fi_domain(domain->fabric, domain->info, &domain->domain, NULL)))
		code = fail(error, "fi_domain", code);
	if (code) {
		fabric_domain_close(domain);
		return code;
	}
	tell(domain->info, facts);
	*out = domain;
	return 0;
}

void fabric_domain_close(struct fabric_domain *domain)
{
	if (domain->domain)
		fi_close(&domain->domain->fid);
	if (domain->fabric)
		fi_close(&domain->fabric->fid);
	if (domain->info)
		lib.freeinfo(domain->info);
	free(domain);
}

/* === endpoint === */

static int open_queue(struct fabric_endpoint *endpoint)
{
	struct fid_domain *domain = endpoint->domain->domain;
	struct fi_cq_attr attr = {
		.size = 2 * MAX_READS,
		.format = FI_CQ_FORMAT_CONTEXT,
		.wait_obj = FI_WAIT_FD,
	};
	endpoint->wait_fd = -1;
	if (!fi_cq_open(domain, &attr, &endpoint->cq, NULL)) {
		if (fi_control(&endpoint->cq->fid, FI_GETWAIT, &endpoint->wait_fd))
			endpoint->wait_fd = -1;
		return 0;
	}
	attr.wait_obj = FI_WAIT_NONE;
	return fi_cq_open(domain, &attr, &endpoint->cq, NULL);
}

static int assemble(struct fabric_endpoint *endpoint, struct fabric_error *error)
{
	struct fabric_domain *domain = endpoint->domain;
	struct fi_av_attr av = { .type = domain->info->domain_attr->av_type, .count = 16 };
	int code;
	if ((code = fi_av_open(domain->domain, &av, &endpoint->av, NULL)))
		return fail(error, "fi_av_open", code);
	if ((code = open_queue(endpoint)))
		return fail(error, "fi_cq_open", code);
	if ((code = fi_endpoint(domain->domain, domain->info, &endpoint->ep, NULL)))
		return fail(error, "fi_endpoint", code);
	if ((code = fi_ep_bind(endpoint->ep, &endpoint->av->fid, 0)))
		return fail(error, "fi_ep_bind (addresses)", code);
	if ((code = fi_ep_bind(endpoint->ep, &endpoint->cq->fid, FI_TRANSMIT | FI_RECV)))
		return fail(error, "fi_ep_bind (completions)", code);
	if ((code = fi_enable(endpoint->ep)))
		return fail(error, "fi_enable", code);
	return 0;
}

int fabric_endpoint_open(struct fabric_domain *domain, struct fabric_endpoint **out,
			 struct fabric_error *error)
{
	struct fabric_endpoint *endpoint = calloc(1, sizeof(*endpoint));
	if (!endpoint)
		return fail(error, "calloc", FI_ENOMEM);
	endpoint->domain = domain;
	for (size_t i = 0; i < MAX_READS; i++) {
		endpoint->slots[i].next_free = endpoint->free;
		endpoint->free = &endpoint->slots[i];
	}
	int code = assemble(endpoint, error);
	if (code) {
		struct fabric_error closing;
		fabric_endpoint_close(endpoint, &closing);
		return code;
	}
	*out = endpoint;
	return 0;
}

int fabric_endpoint_close(struct fabric_endpoint *endpoint, struct fabric_error *error)
{
	int code = endpoint->ep ? fi_close(&endpoint->ep->fid) : 0;
	/* It lives on with what it uses: its reads may go on. */
	if (code)
		return fail(error, "fi_close (endpoint)", code);
	if (endpoint->cq)
		fi_close(&endpoint->cq->fid);
	if (endpoint->av)
		fi_close(&endpoint->av->fid);
	free(endpoint);
	return 0;
}

int fabric_endpoint_address(struct fabric_endpoint *endpoint, void *out, size_t *len,
			    struct fabric_error *error)
{
	int code = fi_getname(&endpoint->ep->fid, out, len);
	return code ? fail(error, "fi_getname", code) : 0;
}

int fabric_endpoint_insert(struct fabric_endpoint *endpoint, const void *address, size_t len,
			   uint64_t *peer, struct fabric_error *error)
{
	/* The provider reads as much as its addresses are long. */
	char own[256];
	size_t own_len = sizeof(own);
	int code = fabric_endpoint_address(endpoint, own, &own_len, error);
	if (code)
		return code;
	if (own_len != len)
		return fail(error, "the peer's address has another length", FI_EADDRNOTAVAIL);
	fi_addr_t inserted = FI_ADDR_UNSPEC;
	int count = fi_av_insert(endpoint->av, address, 1, &inserted, 0, NULL);
	if (count != 1)
		return fail(error, "fi_av_insert", count < 0 ? count : FI_EADDRNOTAVAIL);
	*peer = inserted;
	return 0;
}

/* === region === */

static int enable_on(struct fid_mr *mr, struct fabric_endpoint *endpoint)
{
	int code = fi_mr_bind(mr, &endpoint->ep->fid, 0);
	return code ? code : fi_mr_enable(mr);
}

int fabric_register(struct fabric_domain *domain, struct fabric_endpoint *endpoint, void *at,
		    size_t len, enum fabric_access access, uint64_t key,
		    struct fabric_region **out, struct fabric_error *error)
{
	int mode = mode_of(domain->info);
	struct fabric_region *region = calloc(1, sizeof(*region));
	if (!region)
		return fail(error, "calloc", FI_ENOMEM);
	uint64_t rights = access == FABRIC_READ_BY_PEERS ? FI_REMOTE_READ : FI_READ;
	int code = fi_mr_reg(domain->domain, at, len, rights, 0,
			     mode & FI_MR_PROV_KEY ? 0 : key, 0, &region->mr, NULL);
	if (code) {
		free(region);
		return fail(error, "fi_mr_reg", code);
	}
	if ((mode & FI_MR_ENDPOINT) && (code = enable_on(region->mr, endpoint))) {
		fabric_region_close(region);
		return fail(error, "fi_mr_enable", code);
	}
	*out = region;
	return 0;
}

uint64_t fabric_region_key(const struct fabric_region *region)
{
	return fi_mr_key(region->mr);
}

void fabric_region_close(struct fabric_region *region)
{
	fi_close(&region->mr->fid);
	free(region);
}

/* === reads === */

int fabric_read(struct fabric_endpoint *endpoint, void *into, size_t len,
		const struct fabric_region *local, uint64_t peer, uint64_t at, uint64_t key,
		uint64_t tag, struct fabric_error *error)
{
	struct slot *slot = endpoint->free;
	if (!slot)
		return 1;
	void *desc = local ? fi_mr_desc(local->mr) : NULL;
	slot->tag = tag;
	ssize_t code = fi_read(endpoint->ep, into, len, desc, peer, at, key, &slot->context);
	endpoint->refused = code == -FI_EAGAIN;
	if (endpoint->refused)
		return 1;
	if (code)
		return fail(error, "fi_read", (int)code);
	endpoint->free = slot->next_free;
	endpoint->reads++;
	return 0;
}

static uint64_t finished(struct fabric_endpoint *endpoint, void *context)
{
	struct slot *slot = context;
	slot->next_free = endpoint->free;
	endpoint->free = slot;
	endpoint->reads--;
	return slot->tag;
}

static int failed(struct fabric_endpoint *endpoint, struct fabric_error *error)
{
	struct fi_cq_err_entry entry = { 0 };
	ssize_t got = fi_cq_readerr(endpoint->cq, &entry, 0);
	if (got < 0)
		return fail(error, "fi_cq_readerr", (int)got);
	char detail[128] = "";
	const char *said = fi_cq_strerror(endpoint->cq, entry.prov_errno, entry.err_data, detail,
					  sizeof(detail));
	int code = entry.err ? entry.err : FI_EOTHER;
	error->code = code;
	snprintf(error->text, sizeof(error->text), "read failed: %s (provider: %s, %d)",
		 lib.strerror(code), said ? said : "no more is known", entry.prov_errno);
	if (entry.op_context)
		finished(endpoint, entry.op_context);
	return -code;
}

int fabric_poll(struct fabric_endpoint *endpoint, uint64_t *tags, size_t room,
		struct fabric_error *error)
{
	struct fi_cq_entry entries[POLL_BATCH];
	ssize_t got = fi_cq_read(endpoint->cq, entries, room < POLL_BATCH ? room : POLL_BATCH);
	if (got == -FI_EAGAIN)
		return 0;
	if (got == -FI_EAVAIL)
		return failed(endpoint, error);
	if (got < 0)
		return fail(error, "fi_cq_read", (int)got);
	for (ssize_t i = 0; i < got; i++)
		tags[i] = finished(endpoint, entries[i].op_context);
	return (int)got;
}

int fabric_wait(struct fabric_endpoint *endpoint, int watched, int timeout_ms)
{
	/* A negative descriptor is ignored by poll. */
	struct pollfd fds[] = {
		{ .fd = watched, .events = POLLRDHUP },
		{ .fd = endpoint->wait_fd, .events = POLLIN },
	};
	struct fid *fids[] = { &endpoint->cq->fid };
	if (endpoint->refused && !endpoint->reads)
		timeout_ms = 1;
	if (endpoint->wait_fd < 0) {
		struct timespec nap = { .tv_sec = 0, .tv_nsec = NAP_NS };
		nanosleep(&nap, NULL);
		timeout_ms = 0;
	} else if (fi_trywait(endpoint->domain->fabric, fids, 1)) {
		/* There is something to poll for already. */
		timeout_ms = 0;
	}
	return poll(fds, 2, timeout_ms) > 0 && fds[0].revents != 0;
}
