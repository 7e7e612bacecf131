//! TLS 1.3 over TCP, on the thread that transfers. A receiver pins the listener's certificate; a listener
//! tells by the first byte of a connection whether it speaks TLS.
//!
//! ```text
//!   accept ── first byte 0x16 ──► handshake ──► a link
//!          ── any other ──► a plain link, where plain is offered; else a Fail that says what to dial
//! ```

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_proto::address::{CertPin, HostPort};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConfig, ServerConnection};

use super::identity::{NAME, Pinned};
use super::stream::{ByteStream, StreamLink};
use super::{Closer, Link, LinkError, frame, tcp};
use crate::link::wire::Message;

/// Bytes read from the socket at once: enough for requests at first, more for bulk. rustls by itself
/// reads 4 KiB.
const FIRST_READ: usize = 4 << 10;
const LARGEST_READ: usize = 256 << 10;

/// The first byte of a TLS handshake; plain streams start with the wire's magic.
pub(crate) const HANDSHAKE: u8 = 0x16;
const ALERT: u8 = 0x15;

pub(crate) struct TlsStream {
    connection: Connection,
    socket: Inflow,
    peer: SocketAddr,
}

/// Reads ahead, in larger steps the more there is to read.
struct Inflow {
    socket: TcpStream,
    buffer: Vec<u8>,
    unread: Range<usize>,
}

// === dialling and accepting ===

/// A stream to the listener at `at`, if it shows the certificate that `pin` names.
pub(crate) fn connect(
    at: &HostPort,
    pin: CertPin,
    within: Duration,
) -> Result<Box<dyn Link>, LinkError> {
    let until = Instant::now() + within;
    let socket = tcp::connect(at, within)?;
    let verifier = Pinned::new(pin);
    let failed = |why: String| LinkError::Handshake { addr: at.to_string(), why };
    let broken = |error: io::Error| failed(said(&error, within));
    let config = verifier.client_config().map_err(|error| failed(error.to_string()))?;
    let name = ServerName::try_from(NAME).expect("a valid name");
    let connection = ClientConnection::new(Arc::new(config), name);
    let connection = Connection::Client(connection.map_err(|error| failed(error.to_string()))?);
    let mut stream = TlsStream::over(connection, socket).map_err(broken)?;
    stream.flush_tls().map_err(broken)?;
    let first = first_byte(&stream.socket.socket, until).map_err(broken)?;
    if first != HANDSHAKE && first != ALERT {
        return Err(failed(in_the_clear(&mut stream.socket)));
    }
    match stream.handshake(until) {
        Ok(()) => Ok(Box::new(StreamLink::over(stream))),
        Err(error) => Err(match verifier.mismatch() {
            Some(mismatch) => LinkError::Pin { addr: at.to_string(), mismatch },
            None => broken(error),
        }),
    }
}

/// The listener's side, after [`first_byte`].
pub(crate) fn accept(
    socket: TcpStream,
    config: Arc<ServerConfig>,
    until: Instant,
) -> io::Result<Box<dyn Link>> {
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut stream = TlsStream::over(Connection::Server(connection), socket)?;
    stream.handshake(until)?;
    Ok(Box::new(StreamLink::over(stream)))
}

/// The error for a listener that speaks no TLS, with what it said.
fn in_the_clear(socket: &mut impl Read) -> String {
    let said = match frame::read_message(socket) {
        Ok(Message::Fail { text, .. }) => format!(", it says: {text}"),
        _ => String::new(),
    };
    format!("it answers in the clear though its address asks for TLS{said}")
}

/// Waits for the first byte of a connection, and leaves it there.
pub(crate) fn first_byte(socket: &TcpStream, until: Instant) -> io::Result<u8> {
    let mut byte = [0];
    loop {
        set_timeouts(socket, until)?;
        match socket.peek(&mut byte) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Ok(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn set_timeouts(socket: &TcpStream, until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    tcp::set_patience(socket, left)
}

fn said(error: &io::Error, within: Duration) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => format!("not done within {within:?}"),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
            "it closed the connection".to_owned()
        }
        _ => error.to_string(),
    }
}

// === impl TlsStream ===

impl TlsStream {
    fn over(connection: Connection, socket: TcpStream) -> io::Result<TlsStream> {
        socket.set_nodelay(true)?;
        let peer = socket.peer_addr()?;
        let socket = Inflow { socket, buffer: vec![0; FIRST_READ], unread: 0..0 };
        Ok(TlsStream { connection, socket, peer })
    }

    /// Shakes hands, all of it by `until`, however slowly the peer's bytes come in.
    fn handshake(&mut self, until: Instant) -> io::Result<()> {
        while self.connection.is_handshaking() {
            set_timeouts(&self.socket.socket, until)?;
            self.flush_tls()?;
            if self.connection.is_handshaking() {
                self.fill()?;
            }
        }
        self.flush_tls()
    }

    /// Takes in what the peer sent: at least a byte, or an error.
    fn fill(&mut self) -> io::Result<()> {
        let read = loop {
            match self.connection.read_tls(&mut self.socket) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let processed = self.connection.process_new_packets();
        // An alert that says why, or the answer to a key update.
        let flushed = self.flush_tls();
        processed.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        flushed
    }

    /// Retries inside: what rustls took must not be given to it again.
    fn flush_tls(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut self.socket.socket) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Read for TlsStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(out) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.fill()?,
                other => return other,
            }
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.connection.writer().write(bytes)?;
        self.flush_tls()?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flush_tls()
    }
}

// === impl Inflow ===

impl Read for Inflow {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.unread.is_empty() {
            let read = self.socket.read(&mut self.buffer)?;
            self.unread = 0..read;
        }
        let bytes = &self.buffer[self.unread.clone()];
        let taken = bytes.len().min(out.len());
        out[..taken].copy_from_slice(&bytes[..taken]);
        self.unread.start += taken;
        // It was filled: more is waiting.
        let full = self.unread.end == self.buffer.len();
        if self.unread.is_empty() && full && self.buffer.len() < LARGEST_READ {
            self.buffer.resize(self.buffer.len() * 4, 0);
            self.unread = 0..0;
        }
        Ok(taken)
    }
}

// === impl ByteStream ===

impl ByteStream for TlsStream {
    fn peer(&self) -> String {
        format!("tls://{}", self.peer)
    }

    fn closer(&self) -> io::Result<Closer> {
        tcp::closer(&self.socket.socket)
    }

    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        tcp::set_patience(&self.socket.socket, patience)
    }

    fn is_idle(&mut self) -> bool {
        let state = self.connection.process_new_packets();
        let unread = !state.is_ok_and(|state| state.plaintext_bytes_to_read() == 0);
        !unread && self.socket.unread.is_empty() && tcp::is_quiet(&self.socket.socket)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustls::server::{ClientHello, ResolvesServerCert};
    use rustls::sign::CertifiedKey;

    use super::*;
    use crate::link::identity::Identity;

    /// Shows a certificate that belongs to another key: it was copied.
    #[derive(Debug)]
    struct Copied(Arc<CertifiedKey>);

    impl ResolvesServerCert for Copied {
        fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            Some(Arc::clone(&self.0))
        }
    }

    #[test]
    fn a_copied_certificate_is_worth_nothing_without_its_key() {
        let (owner, thief) =
            (Identity::generate().expect("made"), Identity::generate().expect("made"));
        let pin = owner.pin();
        let config =
            Arc::new(owner.server_config_with(|cert| Arc::new(Copied(thief.certified(cert)))));
        let listener = TcpListener::bind("127.0.0.1:0").expect("port");
        let at = HostPort::from(listener.local_addr().expect("addr"));
        let within = Duration::from_secs(5);
        let error = std::thread::scope(|s| {
            let accepting = s.spawn(|| {
                let (socket, _) = listener.accept().expect("accepted");
                accept(socket, config, Instant::now() + within).err()
            });
            let error = connect(&at, pin, within).err().expect("refused");
            assert!(accepting.join().expect("no panic").is_some(), "no link on either side");
            error.to_string()
        });
        assert!(error.contains("BadSignature") || error.contains("signature"), "{error}");
    }
}
