//! A provider on one device: how it is chosen, and the memory that is registered with it.

use std::collections::BTreeMap;
use std::ffi::{CString, c_int, c_void};
use std::net::IpAddr;
use std::ptr::{NonNull, null, null_mut};
use std::sync::{Arc, Mutex, Weak};

use super::raw::{self, Access, Facts, RawDomain, RawError};
use super::{FabricError, Local, Opened, Region};

/// Tries to find a random key that is free.
const KEY_TRIES: usize = 8;

// libfabric's errnos: ENODATA and FI_ENOKEY.
const NO_DATA: i32 = 61;
const KEY_TAKEN: i32 = 266;

/// Way of registering memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registration {
    /// Registers as little as the provider needs.
    Negotiated,
    /// Registers as most hardware needs it, wherever the code runs.
    #[cfg(test)]
    Basic,
}

/// A provider on one device. Its endpoints may be used from as many threads.
#[derive(Debug)]
pub(crate) struct Domain {
    pub(super) raw: NonNull<RawDomain>,
    pub(super) facts: Facts,
    /// Memory that reads fill, registered once for a mapping.
    pub(super) locals: Mutex<Vec<Local>>,
}

// === impl Domain ===

impl Domain {
    /// Opens a domain on the interface with the address `node`, if the provider names interfaces by it.
    pub(crate) fn open(
        provider: Option<&str>,
        node: Option<IpAddr>,
        registration: Registration,
    ) -> Result<Arc<Domain>, FabricError> {
        let opened = Domain::open_at(provider, node, registration);
        let opened = opened.or_else(|error| match node {
            // Some (efa, shm) have interfaces, but do not name them by IP addresses.
            Some(_) if error.code == NO_DATA => Domain::open_at(provider, None, registration),
            _ => Err(error),
        });
        let domain = opened?;
        check_age(&domain.facts.provider(), domain.facts.version)?;
        Ok(Arc::new(domain))
    }

    /// The domain of an interface: one per interface and process, so that memory is registered once for all
    /// streams. Opened when it is first asked for, closed when nobody has it.
    pub(crate) fn at(interface: IpAddr) -> Result<Arc<Domain>, FabricError> {
        // As many as the host has interfaces.
        static OPEN: Mutex<BTreeMap<IpAddr, Weak<Domain>>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().expect("no holder of the lock panics");
        if let Some(domain) = open.get(&interface).and_then(Weak::upgrade) {
            return Ok(domain);
        }
        let domain = Domain::open(None, Some(interface), Registration::Negotiated)?;
        let facts = domain.facts();
        let (provider, device) = (facts.provider(), facts.device());
        let libfabric = dotted(facts.version);
        tracing::info!(%interface, provider, device, libfabric, "rdma");
        open.insert(interface, Arc::downgrade(&domain));
        Ok(domain)
    }

    fn open_at(
        provider: Option<&str>,
        node: Option<IpAddr>,
        registration: Registration,
    ) -> Result<Domain, FabricError> {
        let c_string = |s: String| CString::new(s).expect("neither has a NUL");
        let asked = provider.map(|p| c_string(p.replace('\0', "")));
        let node = node.map(|ip| c_string(ip.to_string()));
        let pointer = |s: &Option<CString>| s.as_ref().map_or(null(), |s| s.as_ptr());
        let basic = c_int::from(registration != Registration::Negotiated);
        let (mut raw, mut facts, mut error) = (null_mut(), Facts::default(), RawError::default());
        // SAFETY: NUL-terminated strings or NULL, and places to write to, all alive for the call.
        unsafe {
            let (provider, node) = (pointer(&asked), pointer(&node));
            raw::fabric_domain_open(provider, node, basic, &mut raw, &mut facts, &mut error);
        }
        let raw = NonNull::new(raw).ok_or_else(|| error.of(provider.unwrap_or("any provider")))?;
        Ok(Domain { raw, facts, locals: Mutex::default() })
    }

    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }

    pub(super) fn failed(&self, error: &RawError) -> FabricError {
        error.of(&self.facts.provider())
    }

    /// The caller closes the region before the memory is unmapped, or knows that no peer has its key.
    pub(super) fn register(
        &self,
        endpoint: Option<&Arc<Opened>>,
        at: *mut c_void,
        len: usize,
        access: Access,
    ) -> Result<Region, FabricError> {
        let endpoint = endpoint.filter(|_| self.facts.region_by_endpoint).cloned();
        let mut error = RawError::default();
        for _ in 0..KEY_TRIES {
            let mut raw = null_mut();
            let (domain, key) = (self.raw.as_ptr(), self.facts.random_key());
            let bound = endpoint.as_ref().map_or(null_mut(), |e| e.raw.as_ptr());
            // SAFETY: domain and endpoint are open, and registering needs neither alone; the memory is
            // mapped (the caller's word, above).
            unsafe {
                raw::fabric_register(domain, bound, at, len, access, key, &mut raw, &mut error)
            };
            if let Some(raw) = NonNull::new(raw) {
                return Ok(Region { raw, _endpoint: endpoint });
            }
            if error.code != KEY_TAKEN {
                break;
            }
        }
        Err(self.failed(&error))
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        if let Ok(locals) = self.locals.get_mut() {
            locals.clear();
        }
        // SAFETY: endpoints and lent memory hold an `Arc` of it, so none is open.
        unsafe { raw::fabric_domain_close(self.raw.as_ptr()) }
    }
}

// SAFETY: it was opened with FI_THREAD_SAFE, and the C side changes nothing in it.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

/// Refuses a library that may end the process. Before 1.18, `ofi_rxm` reads through a NULL pointer when a
/// transfer failed (libfabric issue 7396): a peer that dies would take this process with it.
fn check_age(provider: &str, version: u32) -> Result<(), FabricError> {
    if !provider.contains("ofi_rxm") || version >= RXM_SINCE {
        return Ok(());
    }
    let text = format!(
        "libfabric {} crashes in ofi_rxm when a transfer fails; install libfabric {} or newer, or name \
         another provider in FI_PROVIDER",
        dotted(version),
        dotted(RXM_SINCE)
    );
    Err(FabricError { provider: provider.to_owned(), code: TOO_OLD, text })
}

/// The first version of libfabric whose `ofi_rxm` is used: 1.18.
const RXM_SINCE: u32 = 1 << 16 | 18;
/// Code of the error about an old library; libfabric's own are positive.
pub(super) const TOO_OLD: i32 = -1;

fn dotted(version: u32) -> String {
    format!("{}.{}", version >> 16, version & 0xffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_libfabric_is_refused_for_ofi_rxm_only_and_told_what_to_install() {
        let error = check_age("tcp;ofi_rxm", 1 << 16 | 17).expect_err("too old").to_string();
        assert!(
            error.contains("libfabric 1.17") && error.contains("install libfabric 1.18"),
            "{error}"
        );
        assert_eq!(check_age("tcp;ofi_rxm", 1 << 16 | 18), Ok(()));
        assert_eq!(check_age("verbs;ofi_rxm", 2 << 16), Ok(()));
        assert_eq!(check_age("tcp", 1 << 16 | 17), Ok(()));
    }
}
