//! Asking several sources for the same thing, of which one answer is enough: a manifest, a delta. Planned
//! parents are asked at once, since receivers that start together are each other's parents and any of them
//! may itself still be asking; every other source only when those before it failed or are silent.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::{FetchRequest, Shared, SourceRef, Tried, adopt};

/// Time without an answer after which the next source is asked as well.
const SILENCE: Duration = Duration::from_millis(200);
/// Time until a cancel is noticed.
const TICK: Duration = Duration::from_millis(50);

/// Why there is no answer.
pub(super) enum Unanswered {
    Cancelled,
    /// Every source failed.
    Failed(Vec<Tried>),
}

/// The first answer that is none of the failures, and whose it is. Who is still asked then may go on for
/// as long as a source may be silent; its answer is dropped.
pub(super) fn first_answer<T, A>(
    shared: &Arc<Shared>,
    request: &FetchRequest,
    ask: A,
) -> Result<(SourceRef, T), Unanswered>
where
    T: Send + 'static,
    A: Fn(&Shared, &SourceRef) -> Result<T, String> + Send + Sync + 'static,
{
    let ask = Arc::new(ask);
    let mut waves: VecDeque<Vec<SourceRef>> = waves(&request.sources).into();
    let (answers, answered) = channel();
    let (mut failed, mut asked, mut next) = (Vec::new(), 0, Instant::now());
    loop {
        if request.cancel.is_cancelled() {
            return Err(Unanswered::Cancelled);
        }
        let now = Instant::now();
        if asked == failed.len() || next <= now {
            let Some(wave) = waves.pop_front() else {
                if asked == failed.len() {
                    return Err(Unanswered::Failed(failed));
                }
                next = now + TICK;
                continue;
            };
            asked += wave.len();
            wave.into_iter().for_each(|source| spawn(shared, source, &ask, &answers));
            next = now + SILENCE;
        }
        match answered.recv_timeout(next.saturating_duration_since(now).min(TICK)) {
            Ok((source, Ok(answer))) => return Ok((source, answer)),
            Ok((source, Err(why))) => {
                failed.push(Tried { addr: source.shown(), holder: source.holder, why });
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }
}

type Answer<T> = (SourceRef, Result<T, String>);

fn spawn<T, A>(shared: &Arc<Shared>, source: SourceRef, ask: &Arc<A>, answers: &Sender<Answer<T>>)
where
    T: Send + 'static,
    A: Fn(&Shared, &SourceRef) -> Result<T, String> + Send + Sync + 'static,
{
    let (shared, ask, to) = (Arc::clone(shared), Arc::clone(ask), answers.clone());
    let asked = source.clone();
    let spawned = std::thread::Builder::new().name("transfer-ask".to_owned()).spawn(move || {
        let answer = ask(&shared, &asked);
        // Nobody waits for it any more where another one was faster.
        to.send((asked, answer)).ok();
    });
    if let Err(error) = spawned {
        answers.send((source, Err(format!("no thread to ask it: {error}")))).ok();
    }
}

/// Sources that are asked together: those of this host, all planned parents (one of each origin: its senders know the
/// same), then each other one by itself.
fn waves(sources: &[SourceRef]) -> Vec<Vec<SourceRef>> {
    let mut origins = BTreeSet::new();
    let (near, far): (Vec<_>, Vec<_>) =
        sources.iter().cloned().partition(|source| adopt::address_here(source).is_some());
    let mut is_first = |origin: &str| origin.is_empty() || origins.insert(origin.to_owned());
    let (parents, others): (Vec<_>, Vec<_>) =
        far.into_iter().partition(|source| !source.stripes.is_empty() && is_first(&source.origin));
    let alone = others.into_iter().map(|source| vec![source]);
    [near, parents].into_iter().chain(alone).filter(|wave| !wave.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use anabranch_proto::address::Address;

    use super::*;

    #[test]
    fn parents_are_asked_together_and_others_one_by_one() {
        let source = |holder: &str, stripes: &[u32]| SourceRef {
            holder: holder.to_owned(),
            addrs: vec![format!("{}:1", holder.replace(' ', "-")).parse().expect("address")],
            grant: Vec::new(),
            stripes: stripes.to_vec(),
            fallback_for: Vec::new(),
            origin: String::new(),
        };
        let listed = [
            source("a", &[0]),
            source("x", &[]),
            source("b", &[1, 2]),
            SourceRef { origin: "t".to_owned(), ..source("sender 1", &[3]) },
            SourceRef { origin: "t".to_owned(), ..source("sender 2", &[3]) },
            source("trainer", &[]),
            SourceRef { addrs: vec![Address::Shm("/proc/self/exe".into())], ..source("here", &[]) },
        ];
        let names = |wave: Vec<SourceRef>| wave.into_iter().map(|s| s.holder).collect::<Vec<_>>();
        let asked: Vec<Vec<String>> = waves(&listed).into_iter().map(names).collect();
        assert_eq!(
            asked,
            [
                vec!["here"],
                vec!["a", "b", "sender 1"],
                vec!["x"],
                vec!["sender 2"],
                vec!["trainer"],
            ]
        );
    }
}
