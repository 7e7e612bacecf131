//! Reads between two endpoints of this process, over whatever provider libfabric finds here (tcp, at
//! least). Without libfabric they say so and pass.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::domain::Registration;
use super::*;

const BYTES: usize = (3 << 20) + 1234;

#[derive(Debug, PartialEq, Eq)]
enum End {
    Fabric(String),
    Ended,
}

impl From<FabricError> for End {
    fn from(error: FabricError) -> End {
        End::Fabric(error.to_string())
    }
}

/// A file of `BYTES` bytes that peers can read.
struct Source {
    endpoint: Endpoint,
    lender: Lender,
    map: Arc<ReadMap>,
    bytes: Vec<u8>,
}

fn domain(registration: Registration) -> Option<Arc<Domain>> {
    let opened =
        load().and_then(|()| Domain::open(None, Some([127, 0, 0, 1].into()), registration));
    opened.inspect_err(skip).ok()
}

/// Says why a test shows nothing here; the harness hides what tests print, but not this.
fn skip(why: &FabricError) {
    use std::io::Write;
    writeln!(std::io::stderr(), "skipped, no rdma can run here: {why}").ok();
}

fn source(domain: &Arc<Domain>) -> Source {
    let bytes: Vec<u8> = (0..BYTES).map(|i| ((i * 31) >> 7) as u8).collect();
    let memory = SharedMap::anonymous("anabranch-test", BYTES as u64).expect("memory");
    memory.write(0..BYTES as u64, |out| out.copy_from_slice(&bytes));
    let map = Arc::new(ReadMap::of(memory.backing(), BYTES as u64).expect("mapped"));
    let endpoint = Endpoint::open(domain).expect("endpoint");
    let lender = endpoint.lender().expect("open");
    Source { endpoint, lender, map, bytes }
}

/// Runs `test` while the source answers.
fn served<R>(source: &mut Source, test: impl FnOnce(&Lender, &Arc<ReadMap>) -> R) -> R {
    let stop = AtomicBool::new(false);
    let Source { endpoint, lender, map, .. } = source;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                endpoint.serve(Duration::from_millis(100)).ok();
            }
        });
        let result = test(lender, map);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// Reads `into` from `from`; gives up after `patience`.
fn read(
    endpoint: &mut Endpoint,
    (address, from): (&[u8], Remote),
    into: &SharedMap,
    patience: Duration,
) -> Result<(), End> {
    let peer = endpoint.insert(address)?;
    let (started, (watched, _open)) = (Instant::now(), UnixStream::pair().expect("pair"));
    into.write(0..into.len(), |bytes| {
        endpoint.read((peer, from), bytes, Some(into), watched.as_fd(), |_, _| {
            if started.elapsed() > patience { Err(End::Ended) } else { Ok(patience) }
        })
    })
}

fn target() -> SharedMap {
    SharedMap::anonymous("anabranch-test", BYTES as u64).expect("memory")
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_read_fills_memory_in_every_way_of_registering_it() {
    for registration in [Registration::Negotiated, Registration::Basic] {
        let Some(domain) = domain(registration) else { return };
        let basic = registration == Registration::Basic;
        assert_eq!(domain.facts().register_local && domain.facts().address_by_virtual, basic);
        let mut source = source(&domain);
        let address = source.endpoint.address().expect("address");
        let into = target();
        served(&mut source, |lender, map| {
            let lent = lender.lend(map).expect("lent");
            let mut endpoint = Endpoint::open(&domain).expect("endpoint");
            for _ in 0..2 {
                let from = (&address[..], lent.remote(0));
                read(&mut endpoint, from, &into, LONG).expect("read");
            }
            assert_eq!(domain.locals.lock().expect("lock").len(), usize::from(basic));
            // An offset within the lent file, into memory that is in no mapping.
            let (peer, mut some) = (endpoint.insert(&address).expect("peer"), vec![0; 777]);
            let (watched, _open) = UnixStream::pair().expect("pair");
            let from = (peer, lent.remote(5000));
            let step = |_: &[u8], _| Ok::<_, End>(LONG);
            endpoint.read(from, &mut some, None, watched.as_fd(), step).expect("read");
            into.read(5000..5777, |expected| assert_eq!(some, expected));
        });
        into.read(0..BYTES as u64, |got| assert!(got == source.bytes, "{registration:?}"));
    }
}

#[test]
fn a_key_is_void_once_the_memory_is_lent_no_more() {
    let Some(domain) = domain(Registration::Negotiated) else { return };
    let mut source = source(&domain);
    let address = source.endpoint.address().expect("address");
    let into = target();
    served(&mut source, |lender, map| {
        let lent = lender.lend(map).expect("lent");
        let from = lent.remote(0);
        let mut endpoint = Endpoint::open(&domain).expect("endpoint");
        read(&mut endpoint, (&address, from), &into, LONG).expect("read");
        into.write(0..BYTES as u64, |bytes| bytes.fill(0));
        drop(lent);
        let refused = read(&mut endpoint, (&address, from), &into, LONG);
        assert!(matches!(refused, Err(End::Fabric(_))), "{refused:?}");
        into.read(0..BYTES as u64, |got| assert!(got.iter().all(|b| *b == 0)));
        // The failed endpoint is of no more use; another one works, and so does another key.
        assert!(endpoint.insert(&address).is_err());
        let mut endpoint = Endpoint::open(&domain).expect("endpoint");
        let lent = lender.lend(map).expect("lent again");
        assert_ne!(lent.remote(0).key, from.key);
        read(&mut endpoint, (&address, lent.remote(0)), &into, LONG).expect("read");
    });
    into.read(0..BYTES as u64, |got| assert!(got == source.bytes));
}

#[test]
fn a_key_that_nobody_gave_reads_nothing() {
    let Some(domain) = domain(Registration::Negotiated) else { return };
    let mut source = source(&domain);
    let address = source.endpoint.address().expect("address");
    let into = target();
    served(&mut source, |lender, map| {
        let lent = lender.lend(map).expect("lent");
        let Remote { at, key } = lent.remote(0);
        let guessed = Remote { at, key: key.wrapping_add(1) };
        let mut endpoint = Endpoint::open(&domain).expect("endpoint");
        let refused = read(&mut endpoint, (&address, guessed), &into, LONG);
        assert!(matches!(refused, Err(End::Fabric(_))), "{refused:?}");
    });
    into.read(0..BYTES as u64, |got| assert!(got.iter().all(|b| *b == 0)));
}

#[test]
fn a_read_that_was_given_up_writes_no_more() {
    let Some(domain) = domain(Registration::Negotiated) else { return };
    let mut source = source(&domain);
    let address = source.endpoint.address().expect("address");
    let lent = source.lender.lend(&source.map).expect("lent");
    let into = target();
    // Connected, so that the reads are on their way when the source falls silent.
    let mut endpoint = Endpoint::open(&domain).expect("endpoint");
    let from = (&address[..], lent.remote(0));
    served(&mut source, |_, _| read(&mut endpoint, from, &into, LONG).expect("read"));
    into.write(0..BYTES as u64, |bytes| bytes.fill(0));
    let ended = read(&mut endpoint, from, &into, Duration::from_millis(100));
    if ended.is_ok() {
        eprintln!("skipped: {} answers without being asked to", domain.facts().provider());
        return;
    }
    assert_eq!(ended, Err(End::Ended));
    let before = into.read(0..BYTES as u64, <[u8]>::to_vec);
    // The source answers again: other endpoints are served, and what was given up stays as it is.
    let other = target();
    served(&mut source, |_, _| {
        let mut endpoint = Endpoint::open(&domain).expect("endpoint");
        read(&mut endpoint, from, &other, LONG).expect("read");
    });
    into.read(0..BYTES as u64, |now| assert!(now == before));
    other.read(0..BYTES as u64, |got| assert!(got == source.bytes));
}

#[test]
fn a_missing_library_is_said_with_its_name() {
    const NAME: &str = "fabric::tests::a_missing_library_is_said_with_its_name";
    if std::env::var_os("ANABRANCH_LIBFABRIC").is_some() {
        let error = load().expect_err("no such library").to_string();
        assert!(error.contains("/nowhere/libfabric.so"), "{error}");
        return;
    }
    // Loading is once for a process: this needs one of its own.
    let own = std::env::current_exe().expect("this test");
    let child = std::process::Command::new(own)
        .args(["--exact", NAME])
        .env("ANABRANCH_LIBFABRIC", "/nowhere/libfabric.so")
        .status();
    assert!(child.expect("started").success());
}
