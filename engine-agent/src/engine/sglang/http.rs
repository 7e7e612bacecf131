//! HTTP/1.1 to one engine. Each request drives its own connection inside its own task: no second
//! task, no channel hop for each chunk. Finished connections are kept for reuse.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Address of the engine, and its idle connections.
#[derive(Clone, Debug)]
pub struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Address as `host:port`, to dial and for the `Host` header.
    authority: String,
    /// API key for the `Authorization` header; `None` if the engine wants none.
    bearer: Option<String>,
    idle: Mutex<Vec<Conn>>,
}

/// An answer whose body is still to be read, with the connection it comes over.
pub struct Reply {
    conn: Conn,
    response: Response<Incoming>,
    pool: Pool,
}

#[derive(Debug)]
struct Conn {
    sender: SendRequest<Full<Bytes>>,
    /// Driver of the connection; `None` once it ended: it must not be polled again.
    driver: Option<Pin<Box<Driver>>>,
}

type Driver = http1::Connection<TokioIo<TcpStream>, Full<Bytes>>;

/// Failure of an HTTP request.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// No connection.
    #[error("cannot connect to {authority}: {source}")]
    Connect {
        /// Address of the engine, `host:port`.
        authority: String,
        /// Cause.
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("connection to {authority} broke: {source}")]
    Broken {
        /// Address of the engine, `host:port`.
        authority: String,
        /// Cause.
        source: hyper::Error,
    },
    /// The connection ended before the answer.
    #[error("{authority} closed the connection before it answered")]
    Closed {
        /// Address of the engine, `host:port`.
        authority: String,
    },
    /// The answer is too large.
    #[error("the answer of {authority} is larger than {limit} bytes")]
    TooLarge {
        /// Address of the engine, `host:port`.
        authority: String,
        /// Limit, in bytes.
        limit: usize,
    },
}

// === impl Pool ===

impl Pool {
    /// A pool without connections.
    pub fn new(authority: String, bearer: Option<String>) -> Pool {
        Pool { shared: Arc::new(Shared { authority, bearer, idle: Mutex::default() }) }
    }

    /// Address of the engine, `host:port`.
    pub fn authority(&self) -> &str {
        &self.shared.authority
    }

    /// Sends a request; `body` is JSON. A kept connection that turns out closed is replaced once.
    pub async fn send(
        &self,
        method: hyper::Method,
        path: &str,
        body: Bytes,
    ) -> Result<Reply, HttpError> {
        while let Some(mut conn) = self.take_idle() {
            if !conn.is_open().await {
                continue;
            }
            match conn.send(self.request(method.clone(), path, body.clone())).await {
                Ok(response) => return Ok(Reply { conn, response, pool: self.clone() }),
                Err(Some(error)) if !error.is_canceled() && !error.is_incomplete_message() => {
                    return Err(self.broken(error));
                }
                Err(_) => {}
            }
        }
        let mut conn = self.connect().await?;
        match conn.send(self.request(method, path, body)).await {
            Ok(response) => Ok(Reply { conn, response, pool: self.clone() }),
            Err(Some(error)) => Err(self.broken(error)),
            Err(None) => Err(HttpError::Closed { authority: self.shared.authority.clone() }),
        }
    }

    async fn connect(&self) -> Result<Conn, HttpError> {
        let authority = &self.shared.authority;
        let connect = |source| HttpError::Connect { authority: authority.clone(), source };
        let socket = TcpStream::connect(authority).await.map_err(connect)?;
        socket.set_nodelay(true).map_err(connect)?;
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(READ_BUFFER_BYTES)
            .handshake(TokioIo::new(socket))
            .await
            .map_err(|error| self.broken(error))?;
        Ok(Conn { sender, driver: Some(Box::pin(driver)) })
    }

    fn request(&self, method: hyper::Method, path: &str, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, self.authority())
            .header(hyper::header::CONTENT_TYPE, "application/json");
        if let Some(bearer) = &self.shared.bearer {
            request = request.header(hyper::header::AUTHORIZATION, format!("Bearer {bearer}"));
        }
        request.body(Full::new(body)).expect("the parts were checked when the pool was made")
    }

    fn broken(&self, source: hyper::Error) -> HttpError {
        HttpError::Broken { authority: self.shared.authority.clone(), source }
    }

    fn take_idle(&self) -> Option<Conn> {
        self.idle().pop()
    }

    fn give_back(&self, conn: Conn) {
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE {
            idle.push(conn);
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Conn>> {
        self.shared.idle.lock().expect("no code panics while it holds this lock")
    }
}

/// Most bytes that hyper reads at once; a busy stream's chunk is below 2 KiB, a prompt's answer may
/// be large.
const READ_BUFFER_BYTES: usize = 64 << 10;

/// Connections kept for reuse: as many as samples run on a large engine.
const MAX_IDLE: usize = 2048;

// === impl Reply ===

impl Reply {
    /// Status of the answer.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// The next piece of the body; `None` at its end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        loop {
            let body = self.response.body_mut();
            let frame = self.conn.drive(body.frame()).await;
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => return Ok(Some(data)),
                    Err(Frame { .. }) => {}
                },
                Some(Err(error)) => return Err(self.pool.broken(error)),
                None => return Ok(None),
            }
        }
    }

    /// The rest of the body, `limit` bytes at most. The connection is kept.
    pub async fn bytes(mut self, limit: usize) -> Result<Bytes, HttpError> {
        let body = Limited::new(self.response.body_mut(), limit);
        let collected = self.conn.drive(body.collect()).await;
        match collected {
            Ok(collected) => {
                let bytes = collected.to_bytes();
                self.keep().await;
                Ok(bytes)
            }
            Err(error) if error.is::<LengthLimitError>() => {
                Err(HttpError::TooLarge { authority: self.pool.authority().to_owned(), limit })
            }
            Err(error) => match error.downcast::<hyper::Error>() {
                Ok(error) => Err(self.pool.broken(*error)),
                Err(_) => Err(HttpError::Closed { authority: self.pool.authority().to_owned() }),
            },
        }
    }

    /// Keeps the connection for the next request; call at the end of the body.
    pub async fn keep(mut self) {
        if self.conn.is_open().await {
            self.pool.give_back(self.conn);
        }
    }
}

// === impl Conn ===

impl Conn {
    /// Sends a request. `Err(None)` if the connection ended without saying why.
    async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Option<hyper::Error>> {
        let sent = self.sender.send_request(request);
        drive(&mut self.driver, sent).await.map_err(Some)
    }

    async fn drive<F: Future>(&mut self, work: F) -> F::Output {
        drive(&mut self.driver, work).await
    }

    /// Notices a close that came while the connection lay idle.
    async fn is_open(&mut self) -> bool {
        let driver = &mut self.driver;
        poll_fn(|cx| {
            if let Some(connection) = driver
                && connection.as_mut().poll(cx).is_ready()
            {
                *driver = None;
            }
            Poll::Ready(())
        })
        .await;
        self.driver.is_some() && !self.sender.is_closed()
    }
}

/// Polls the connection first: what it reads, `work` has in the same poll.
async fn drive<F: Future>(driver: &mut Option<Pin<Box<Driver>>>, work: F) -> F::Output {
    let mut work = pin!(work);
    poll_fn(|cx| {
        if let Some(connection) = driver
            && connection.as_mut().poll(cx).is_ready()
        {
            *driver = None;
        }
        work.as_mut().poll(cx)
    })
    .await
}
