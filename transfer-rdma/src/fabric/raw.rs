//! The declarations of `csrc/fabric.h`.

use std::ffi::{c_char, c_int, c_void};

use super::FabricError;

#[repr(C)]
pub(super) struct RawDomain {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct RawEndpoint {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct RawRegion {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct RawError {
    pub(super) code: i32,
    text: [c_char; 252],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) enum Access {
    ReadByPeers = 0,
    FilledByReads = 1,
}

/// Facts negotiated with the provider.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    provider: [c_char; 64],
    device: [c_char; 64],
    /// Version of the library: major << 16 | minor.
    pub(crate) version: u32,
    pub(crate) address_format: u32,
    pub(super) max_read_bytes: u64,
    max_reads: u32,
    key_bytes: u32,
    pub(super) address_by_virtual: bool,
    key_by_provider: bool,
    pub(super) register_local: bool,
    pub(super) region_by_endpoint: bool,
}

unsafe extern "C" {
    pub(super) fn fabric_load(error: *mut RawError) -> c_int;
    pub(super) fn fabric_domain_open(
        provider: *const c_char,
        node: *const c_char,
        basic: c_int,
        out: *mut *mut RawDomain,
        facts: *mut Facts,
        error: *mut RawError,
    ) -> c_int;
    pub(super) fn fabric_domain_close(domain: *mut RawDomain);
    pub(super) fn fabric_endpoint_open(
        domain: *mut RawDomain,
        out: *mut *mut RawEndpoint,
        error: *mut RawError,
    ) -> c_int;
    pub(super) fn fabric_endpoint_close(endpoint: *mut RawEndpoint, error: *mut RawError) -> c_int;
    pub(super) fn fabric_endpoint_address(
        endpoint: *mut RawEndpoint,
        out: *mut c_void,
        len: *mut usize,
        error: *mut RawError,
    ) -> c_int;
    pub(super) fn fabric_endpoint_insert(
        endpoint: *mut RawEndpoint,
        address: *const c_void,
        len: usize,
        peer: *mut u64,
        error: *mut RawError,
    ) -> c_int;
    pub(super) fn fabric_register(
        domain: *mut RawDomain,
        endpoint: *mut RawEndpoint,
        at: *mut c_void,
        len: usize,
        access: Access,
        key: u64,
        out: *mut *mut RawRegion,
        error: *mut RawError,
    ) -> c_int;
    pub(super) fn fabric_region_key(region: *const RawRegion) -> u64;
    pub(super) fn fabric_region_close(region: *mut RawRegion);
    pub(super) fn fabric_read(
        endpoint: *mut RawEndpoint,
        into: *mut c_void,
        len: usize,
        local: *const RawRegion,
        peer: u64,
        at: u64,
        key: u64,
        tag: u64,
        error: *mut RawError,
    ) -> c_int;
    pub(super) fn fabric_poll(
        endpoint: *mut RawEndpoint,
        tags: *mut u64,
        room: usize,
        error: *mut RawError,
    ) -> c_int;
    pub(super) fn fabric_wait(
        endpoint: *mut RawEndpoint,
        watched: c_int,
        timeout_ms: c_int,
    ) -> c_int;
}

// === impl RawError ===

impl RawError {
    pub(super) fn of(&self, provider: &str) -> FabricError {
        FabricError { provider: provider.to_owned(), code: self.code, text: text(&self.text) }
    }
}

impl Default for RawError {
    fn default() -> RawError {
        RawError { code: 0, text: [0; 252] }
    }
}

// === impl Facts ===

impl Facts {
    /// The provider's name in libfabric.
    pub(crate) fn provider(&self) -> String {
        text(&self.provider)
    }

    pub(crate) fn device(&self) -> String {
        text(&self.device)
    }

    /// A key that nobody can guess, for providers that let us choose it.
    pub(super) fn random_key(&self) -> u64 {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).expect("the system gives random bytes");
        u64::from_le_bytes(bytes) >> (64 - 8 * self.key_bytes.clamp(1, 8))
    }
}

impl Default for Facts {
    fn default() -> Facts {
        Facts {
            provider: [0; 64],
            device: [0; 64],
            version: 0,
            address_format: 0,
            max_read_bytes: 0,
            max_reads: 0,
            key_bytes: 0,
            address_by_virtual: false,
            key_by_provider: false,
            register_local: false,
            region_by_endpoint: false,
        }
    }
}

fn text(chars: &[c_char]) -> String {
    let bytes: Vec<u8> = chars.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
