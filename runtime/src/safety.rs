//! The rule for listeners: none off loopback without TLS and tokens, unless the user says
//! `--insecure`.

use std::net::SocketAddr;

use crate::exit::Exit;

/// A listener that would let in anybody who can reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "refusing to listen on {addr}: it is reachable from other hosts and {} off. \
     Turn that on, listen on 127.0.0.1, or say --insecure if the network itself is trusted",
    missing(*.tls, *.tokens)
)]
pub struct UnsafeListen {
    /// Address that would be listened on.
    pub addr: SocketAddr,
    /// True if the listener uses TLS.
    pub tls: bool,
    /// True if the listener asks for join tokens.
    pub tokens: bool,
}

impl UnsafeListen {
    /// Exit status 77: the address would be exposed.
    pub fn exit_code(&self) -> u8 {
        Exit::NoPermission.code()
    }
}

/// Checks the rule for `addr`; call before `bind`. An unspecified address (0.0.0.0, ::) counts as
/// reachable.
pub fn check_listen(
    addr: SocketAddr,
    tls: bool,
    tokens: bool,
    insecure: bool,
) -> Result<(), UnsafeListen> {
    if addr.ip().to_canonical().is_loopback() || insecure || (tls && tokens) {
        return Ok(());
    }
    Err(UnsafeListen { addr, tls, tokens })
}

fn missing(tls: bool, tokens: bool) -> &'static str {
    match (tls, tokens) {
        (false, false) => "TLS and join tokens are",
        (false, true) => "TLS is",
        (true, _) => "the check of join tokens is",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(addr: &str, tls: bool, tokens: bool, insecure: bool) -> bool {
        check_listen(addr.parse().expect("address"), tls, tokens, insecure).is_ok()
    }

    #[test]
    fn loopback_needs_nothing() {
        for addr in ["127.0.0.1:5000", "127.9.9.9:1", "[::1]:5000", "[::ffff:127.0.0.1]:5000"] {
            assert!(check(addr, false, false, false), "{addr}");
        }
    }

    #[test]
    fn other_addresses_need_tls_and_tokens_or_a_word() {
        for addr in ["0.0.0.0:5000", "[::]:5000", "10.0.0.4:5000", "[2001:db8::1]:5000"] {
            assert!(!check(addr, false, false, false), "{addr}");
            assert!(!check(addr, true, false, false), "{addr}");
            assert!(!check(addr, false, true, false), "{addr}");
            assert!(check(addr, true, true, false), "{addr}");
            assert!(check(addr, false, false, true), "{addr}");
        }
    }

    #[test]
    fn the_refusal_says_what_to_do() {
        let addr = "0.0.0.0:5000".parse().expect("address");
        let error = check_listen(addr, false, true, false).expect_err("no TLS");
        assert_eq!(
            error.to_string(),
            "refusing to listen on 0.0.0.0:5000: it is reachable from other hosts and TLS is off. \
             Turn that on, listen on 127.0.0.1, or say --insecure if the network itself is trusted"
        );
    }
}
