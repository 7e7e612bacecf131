//! Real sockets on loopback: both protocols, plain and TLS, and the end of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::ConnectInfo;
use axum::routing::{get, post};
use http::uri::PathAndQuery;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::*;
use crate::connect::{ConnectError, connect};
use crate::endpoint::Announce;
use crate::tls::{Ca, pinned_client_config};
use crate::token::{CertDigest, JoinToken, Role};

struct Running {
    drain: Drain,
    addr: SocketAddr,
    server: JoinHandle<()>,
}

async fn start(tls: Option<Arc<ServerConfig>>, options: ServeOptions) -> Running {
    let drain = Drain::new();
    let listener = bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("bound");
    let server = drain.spawn("server", serve(listener, router(), tls, drain.clone(), options));
    Running { drain, addr, server }
}

async fn plain() -> Running {
    start(None, ServeOptions::default()).await
}

/// A server with an authority of its own, and a token that pins it.
async fn with_tls() -> (Running, JoinToken) {
    let dir = tempfile::tempdir().expect("dir");
    let ca = Ca::load_or_create(dir.path()).expect("created");
    let config = ca.server_config(&["localhost".into(), "127.0.0.1".into()]).expect("config");
    let token = JoinToken::mint(ca.digest(), Role::Agent, "j").expect("minted");
    (start(Some(config), ServeOptions::default()).await, token)
}

fn router() -> Router {
    Router::new()
        .route(
            "/peer",
            get(|ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.ip().to_string() }),
        )
        .route("/t.Test/Echo", post(echo))
        .route("/t.Test/Endless", post(endless))
}

async fn echo(request: axum::extract::Request) -> http::Response<tonic::body::Body> {
    let service = tower::service_fn(|request: Request<String>| async move {
        Ok::<_, Status>(Response::new(request.into_inner() + "!"))
    });
    tonic::server::Grpc::new(ProstCodec::<String, String>::default()).unary(service, request).await
}

/// Sends one item and then nothing, for ever.
async fn endless(request: axum::extract::Request) -> http::Response<tonic::body::Body> {
    let service = tower::service_fn(|request: Request<String>| async move {
        let first = tokio_stream::once(Ok::<_, Status>(request.into_inner()));
        Ok::<_, Status>(Response::new(first.chain(tokio_stream::pending())))
    });
    tonic::server::Grpc::new(ProstCodec::<String, String>::default())
        .server_streaming(service, request)
        .await
}

async fn call_echo(channel: Channel, text: &str) -> Result<String, Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let path = PathAndQuery::from_static("/t.Test/Echo");
    let codec = ProstCodec::<String, String>::default();
    Ok(grpc.unary(Request::new(text.to_owned()), path, codec).await?.into_inner())
}

async fn call_endless(channel: Channel) -> Streaming<String> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("ready");
    let path = PathAndQuery::from_static("/t.Test/Endless");
    let codec = ProstCodec::<String, String>::default();
    let call = grpc.server_streaming(Request::new("first".to_owned()), path, codec);
    call.await.expect("started").into_inner()
}

async fn get_h1(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> String {
    let request = b"GET /peer HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answered");
    answer
}

fn message(error: ConnectError) -> String {
    error.to_string()
}

#[tokio::test]
async fn one_plain_port_answers_http1_and_grpc() {
    let run = plain().await;
    let answer = get_h1(TcpStream::connect(run.addr).await.expect("connected")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("127.0.0.1"), "{answer}");
    let channel = connect(&format!("http://{}", run.addr), None).await.expect("connected");
    assert_eq!(call_echo(channel, "hello").await.expect("echoed"), "hello!");
    run.drain.close(Duration::from_secs(5)).await.expect("all ended");
}

#[tokio::test]
async fn one_tls_port_answers_http1_and_grpc_under_any_name() {
    let (run, token) = with_tls().await;
    for host in ["127.0.0.1", "localhost"] {
        let uri = format!("https://{host}:{}", run.addr.port());
        let channel = connect(&uri, Some(&token)).await.expect("connected");
        assert_eq!(call_echo(channel, host).await.expect("echoed"), format!("{host}!"));
    }
    let mut config: ClientConfig = pinned_client_config(token.ca());
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let tcp = TcpStream::connect(run.addr).await.expect("connected");
    // A name that is not in the certificate: the pin is what counts.
    let name = ServerName::try_from("elsewhere.example").expect("a name");
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("handshake");
    let answer = get_h1(tls).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_wrong_pin_is_refused_and_explained() {
    let (run, _) = with_tls().await;
    let foreign = JoinToken::mint(CertDigest::of(b"another"), Role::Agent, "j").expect("minted");
    let uri = format!("https://{}", run.addr);
    let error = connect(&uri, Some(&foreign)).await.expect_err("wrong pin");
    assert!(matches!(error, ConnectError::WrongPin { .. }), "{error:?}");
    assert!(!error.may_retry());
    assert_eq!(error.exit_code(), 77);
    assert!(message(error).contains("is not the manager that this join token was made for"));
}

#[tokio::test]
async fn an_authority_that_is_shown_but_did_not_sign_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let (real, fake) = (dir.path().join("real"), dir.path().join("fake"));
    let token = {
        let ca = Ca::load_or_create(&real).expect("created");
        JoinToken::mint(ca.digest(), Role::Agent, "j").expect("minted")
    };
    Ca::load_or_create(&fake).expect("created");
    // The thief knows the real authority's certificate, as everybody may, but has its own key.
    std::fs::copy(real.join("ca-cert.pem"), fake.join("ca-cert.pem")).expect("copied");
    let thief = Ca::load_or_create(&fake).expect("loaded");
    let config = thief.server_config(&["127.0.0.1".into()]).expect("config");
    let run = start(Some(config), ServeOptions::default()).await;
    let uri = format!("https://{}", run.addr);
    let error = connect(&uri, Some(&token)).await.expect_err("not signed by the real one");
    assert!(matches!(error, ConnectError::Tls { .. }), "{error:?}");
}

#[tokio::test]
async fn mistakes_in_dialling_are_told_apart() {
    let (tls, token) = with_tls().await;
    let plain = plain().await;
    let no_token = connect(&format!("https://{}", tls.addr), None).await.expect_err("no token");
    assert!(matches!(no_token, ConnectError::NeedsToken { .. }));
    let to_plain = connect(&format!("https://{}", plain.addr), Some(&token)).await;
    assert!(message(to_plain.expect_err("plain")).contains("dial http:// instead"));
    let free = bind("127.0.0.1:0").await.expect("bound").local_addr().expect("address");
    let refused = connect(&format!("http://{free}"), None).await.expect_err("nobody there");
    assert!(matches!(refused, ConnectError::Refused { .. }), "{refused:?}");
    assert_eq!(refused.exit_code(), 69);
    let dns = connect("http://no-such-host.invalid:5000", None).await.expect_err("no such host");
    assert!(matches!(dns, ConnectError::Dns { .. }), "{dns:?}");
    let form = connect("localhost:5000", None).await.expect_err("no scheme");
    assert_eq!(form.exit_code(), 64);
}

#[tokio::test]
async fn an_announce_file_is_enough_to_connect() {
    let (run, token) = with_tls().await;
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("manager.json");
    let url = format!("https://{}", run.addr);
    Announce { url, token: Some(token.to_string()) }.write(&path).expect("written");
    let channel = connect(&format!("file:{}", path.display()), None).await.expect("connected");
    assert_eq!(call_echo(channel, "file").await.expect("echoed"), "file!");
}

#[tokio::test]
async fn the_channel_dials_again_after_the_server_came_back() {
    let first = plain().await;
    let channel = connect(&format!("http://{}", first.addr), None).await.expect("connected");
    call_echo(channel.clone(), "one").await.expect("echoed");
    first.drain.close(Duration::from_secs(5)).await.expect("closed");
    let listener = bind(&first.addr.to_string()).await.expect("the port is free again");
    let drain = Drain::new();
    let options = ServeOptions::default();
    drain.spawn("server", serve(listener, router(), None, drain.clone(), options));
    let mut last = None;
    for _ in 0..10 {
        match call_echo(channel.clone(), "two").await {
            Ok(text) => return assert_eq!(text, "two!"),
            Err(status) => last = Some(status),
        }
    }
    panic!("never reconnected: {last:?}");
}

#[tokio::test]
async fn shutdown_cuts_an_endless_stream_at_its_deadline_and_not_before() {
    let deadline = Duration::from_millis(200);
    let options = ServeOptions { shutdown_deadline: deadline, ..ServeOptions::default() };
    let run = start(None, options).await;
    let channel = connect(&format!("http://{}", run.addr), None).await.expect("connected");
    let mut stream = call_endless(channel).await;
    assert_eq!(stream.message().await.expect("item").as_deref(), Some("first"));
    let from = Instant::now();
    run.drain.close(Duration::from_secs(5)).await.expect("cut, so that all ended");
    let took = from.elapsed();
    assert!(took >= deadline && took < Duration::from_secs(3), "{took:?}");
    assert!(stream.message().await.is_err(), "the client sees that it was cut");
    run.server.await.expect("ended");
    assert!(matches!(
        connect(&format!("http://{}", run.addr), None).await,
        Err(ConnectError::Refused { .. })
    ));
}

#[tokio::test]
async fn an_idle_connection_does_not_hold_up_shutdown() {
    let run = plain().await;
    let channel = connect(&format!("http://{}", run.addr), None).await.expect("connected");
    call_echo(channel.clone(), "x").await.expect("echoed");
    let from = Instant::now();
    run.drain.close(Duration::from_secs(5)).await.expect("all ended");
    assert!(from.elapsed() < Duration::from_secs(2), "{:?}", from.elapsed());
    drop(channel);
}

#[tokio::test]
async fn a_client_that_never_shakes_hands_is_dropped() {
    let dir = tempfile::tempdir().expect("dir");
    let config = Ca::load_or_create(dir.path())
        .and_then(|ca| ca.server_config(&["localhost".into()]))
        .expect("config");
    let options =
        ServeOptions { tls_timeout: Duration::from_millis(100), ..ServeOptions::default() };
    let run = start(Some(config), options).await;
    let mut silent = TcpStream::connect(run.addr).await.expect("connected");
    let read = tokio::time::timeout(Duration::from_secs(5), silent.read_u8()).await;
    assert!(read.expect("the server hangs up").is_err());
}

/// A peer like a process stopped by SIGSTOP: its kernel acknowledges, but the process answers no
/// ping.
#[tokio::test]
async fn a_silent_http2_client_is_dropped_after_the_keepalive() {
    let run = plain().await;
    let mut silent = TcpStream::connect(run.addr).await.expect("connected");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let empty_settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    silent.write_all(&[&preface[..], &empty_settings].concat()).await.expect("sent");
    let from = Instant::now();
    let mut sink = Vec::new();
    let limit = KEEPALIVE_INTERVAL + KEEPALIVE_TIMEOUT + Duration::from_secs(3);
    let read = tokio::time::timeout(limit, silent.read_to_end(&mut sink)).await;
    let _ = read.expect("the server hangs up");
    assert!(from.elapsed() >= KEEPALIVE_TIMEOUT, "{:?}", from.elapsed());
}

#[tokio::test]
async fn clients_beyond_the_limit_wait_for_a_place() {
    let options = ServeOptions { max_connections: 1, ..ServeOptions::default() };
    let run = start(None, options).await;
    let uri = format!("http://{}", run.addr);
    let first = connect(&uri, None).await.expect("connected");
    call_echo(first.clone(), "a").await.expect("echoed");
    let second = TcpStream::connect(run.addr).await.expect("the kernel accepts");
    let mut second = Box::pin(get_h1(second));
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut second).await.is_err());
    drop(first);
    let answer = tokio::time::timeout(Duration::from_secs(5), second).await.expect("its turn");
    assert!(answer.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_taken_port_is_named_with_the_way_out() {
    let holder = bind("127.0.0.1:0").await.expect("bound");
    let addr = holder.local_addr().expect("address").to_string();
    let error = bind(&addr).await.expect_err("taken");
    let text = error.to_string();
    assert!(text.contains(&addr) && text.contains("--listen") && text.contains("ss -ltnp"));
    assert_eq!(error.exit_code(), 73);
    let nowhere = bind("192.0.2.1:0").await.expect_err("not ours");
    assert!(matches!(nowhere, ListenError::Other { .. }));
}
