use anabranch_engine::synthetic::{self, Chain, SyntheticParams, WeightsKey};
use anabranch_proto::{pb, seed, tokens};
use pb::trajectory::Finish;
use proptest::prelude::*;

use super::*;

const JOB_SEED: u64 = 77;
const MODEL: SyntheticParams = SyntheticParams { vocab: 32_000, eos_id: 2, mean_len: Some(150) };

struct World {
    job: Job,
    asked: Vec<Asked>,
    weights: Vec<Weights>,
    delivered: Vec<pb::Trajectory>,
}

/// One corruption: what it does to a good run, and the kind of error that must come out of it.
type Corruption = (&'static str, fn(&mut World, usize, usize));

const CORRUPTIONS: &[Corruption] = &[
    ("token", |w, s, at| {
        w.edit(s, |ids, _| {
            ids.remove(at);
        })
    }),
    ("token", |w, s, at| {
        w.edit(s, |ids, lps| {
            ids.insert(at, ids[at]);
            lps.insert(at, lps[at]);
        })
    }),
    ("token", |w, s, at| w.edit(s, |ids, _| ids.swap(at, at + 1))),
    ("token", |w, s, at| w.edit(s, |ids, _| ids[at] = (ids[at] + 1) % 31_000 + 3)),
    ("logprob", |w, s, _| w.edit(s, |_, lps| lps.rotate_right(1))),
    ("logprob", |w, s, at| w.edit(s, |_, lps| lps[at] = f32::from_bits(lps[at].to_bits() ^ 1))),
    ("version", |w, s, _| w.spans(s)[0].version = Some(version(2))),
    ("version", |w, s, at| w.move_seam(s, at)),
    ("unknown_version", |w, s, _| w.spans(s)[1].version = Some(version(9))),
    ("engine", |w, s, _| w.spans(s)[1].engine = Some(engine("stranger"))),
    ("spans", |w, s, _| w.spans(s)[1].start += 1),
    ("spans", |w, s, _| {
        w.spans(s).pop();
    }),
    ("seed", |w, s, _| w.delivered[s].seed += 1),
    ("token", |w, s, _| w.take_content_of_sibling(s)),
    ("foreign", |w, s, _| w.delivered[s].key = "nobody".into()),
    ("foreign", |w, s, _| w.delivered[s].index = 99),
    ("past_eos", |w, s, _| w.run_past_eos(s)),
    ("finish", |w, s, _| w.flip_finish(s)),
    ("finish", |w, s, at| w.cut(s, at)),
    ("columns", |w, s, _| w.delivered[s].logprobs.truncate(4)),
];

impl World {
    fn new(samples: u32) -> World {
        let weights: Vec<Weights> = (1..=2)
            .map(|number| Weights { epoch: 0, number, digest: hex::encode([number as u8; 32]) })
            .collect();
        let asked: Vec<Asked> = (0..samples)
            .map(|g| Asked {
                key: format!("k{g}"),
                n: 2,
                prompt: (0..10 + g).map(|i| 100 + i * 7 + g).collect(),
                max_tokens: 100 + g * 10,
                min_tokens: 20,
                ignore_eos: false,
            })
            .collect();
        let delivered = asked
            .iter()
            .flat_map(|a| (0..a.n).map(move |index| generate(a, index, a.max_tokens)))
            .collect();
        let job = Job { seed: JOB_SEED, model: MODEL, engines: vec!["e1".into(), "e2".into()] };
        World { job, asked, weights, delivered }
    }

    fn judge(&self) -> Verdict {
        judge(&self.job, &self.asked, &self.weights, &self.delivered, false)
    }

    fn spans(&mut self, s: usize) -> &mut Vec<pb::Span> {
        &mut self.delivered[s].spans
    }

    /// Keeps the columns and the last span as long as the tokens, as a ledger with a bug would.
    fn edit(&mut self, s: usize, change: impl FnOnce(&mut Vec<u32>, &mut Vec<f32>)) {
        let t = &mut self.delivered[s];
        let mut ids: Vec<u32> = tokens::ids(&t.tokens).collect();
        let mut logprobs: Vec<f32> = tokens::logprobs(&t.logprobs).collect();
        change(&mut ids, &mut logprobs);
        logprobs.truncate(ids.len());
        t.tokens = tokens::encode_ids(&ids);
        t.logprobs = tokens::encode_logprobs(&logprobs);
        let last = t.spans.last_mut().unwrap();
        last.len = ids.len() as u32 - last.start;
    }

    /// The seam between two versions, some tokens late.
    fn move_seam(&mut self, s: usize, by: usize) {
        let spans = self.spans(s);
        let by = (by as u32).clamp(1, spans[1].len - 1);
        spans[0].len += by;
        spans[1].start += by;
        spans[1].len -= by;
    }

    fn take_content_of_sibling(&mut self, s: usize) {
        let sibling = self.delivered[s ^ 1].clone();
        let (index, seed) = (self.delivered[s].index, self.delivered[s].seed);
        self.delivered[s] = pb::Trajectory { index, seed, ..sibling };
    }

    fn run_past_eos(&mut self, s: usize) {
        let asked = self.asked[s / 2].clone();
        let mut long = generate_until(&asked, self.delivered[s].index, 2_000, false);
        long.finish = Finish::Length as i32;
        self.asked[s / 2].max_tokens = 2_000;
        self.delivered[s] = long;
    }

    fn flip_finish(&mut self, s: usize) {
        let t = &mut self.delivered[s];
        t.finish = match t.finish() {
            Finish::Stop => Finish::Length,
            _ => Finish::Stop,
        } as i32;
    }

    fn cut(&mut self, s: usize, at: usize) {
        let keep = at.max(self.delivered[s].spans[1].start as usize + 1);
        self.edit(s, |ids, _| ids.truncate(keep));
    }
}

fn version(number: u64) -> pb::Version {
    let root = bytes::Bytes::from(if number == 0 { vec![] } else { vec![1; 32] });
    pb::Version { epoch: 0, number, root }
}

fn engine(id: &str) -> pb::Engine {
    pb::Engine { id: id.into(), incarnation: 5, ..Default::default() }
}

fn generate(asked: &Asked, index: u32, max: u32) -> pb::Trajectory {
    generate_until(asked, index, max, true)
}

/// Six tokens of the start-up weights on e1, then version 1 on e2.
fn generate_until(asked: &Asked, index: u32, max: u32, stop_at_eos: bool) -> pb::Trajectory {
    let seed = seed::of_sample(JOB_SEED, &asked.key, index);
    let keys = [WeightsKey::new(&synthetic::base_digest()), WeightsKey::new(&[1; 32])];
    let mut chain = Chain::new(seed).extend(&asked.prompt);
    let (mut ids, mut logprobs, mut finish) = (Vec::new(), Vec::new(), Finish::Length);
    for at in 0..max {
        let made = synthetic::next(chain, keys[usize::from(at >= 6)], MODEL, at < asked.min_tokens);
        chain = chain.push(made.token);
        ids.push(made.token);
        logprobs.push(made.logprob);
        if made.token == MODEL.eos_id && stop_at_eos {
            finish = Finish::Stop;
            break;
        }
    }
    let span = |start: u32, len: u32, id: &str, number| pb::Span {
        start,
        len,
        engine: Some(engine(id)),
        version: Some(version(number)),
        exact: true,
        ..Default::default()
    };
    pb::Trajectory {
        key: asked.key.clone(),
        index,
        spans: vec![span(0, 6, "e1", 0), span(6, ids.len() as u32 - 6, "e2", 1)],
        tokens: tokens::encode_ids(&ids),
        logprobs: tokens::encode_logprobs(&logprobs),
        finish: finish as i32,
        attempts: 2,
        seed,
        ..Default::default()
    }
}

#[test]
fn a_good_run_is_clean_and_counted() {
    let world = World::new(12);
    let verdict = world.judge();
    let len = |t: &pb::Trajectory| (t.tokens.len() / 4) as u64;
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(verdict.verified_tokens, world.delivered.iter().map(len).sum::<u64>());
    assert_eq!((verdict.samples_asked, verdict.samples_verified), (24, 24));
    assert_eq!((verdict.migrations, verdict.extra_placements, verdict.engine_lives), (24, 24, 2));
    assert_eq!(verdict.tokens_by_version[&0], 24 * 6);
    let finishes: BTreeSet<i32> = world.delivered.iter().map(|t| t.finish).collect();
    assert_eq!(finishes.len(), 2, "the run has both finishes: {finishes:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_corruption_of_any_sample_is_found_and_named(
        which in 0..CORRUPTIONS.len(), s in 0usize..24, at in 6usize..18,
    ) {
        let mut world = World::new(12);
        let (kind, corrupt) = CORRUPTIONS[which];
        corrupt(&mut world, s, at);
        let verdict = world.judge();
        prop_assert!(!verdict.is_clean());
        prop_assert!(verdict.provenance_errors >= 1);
        prop_assert!(verdict.errors_by_kind.contains_key(kind), "corruption {which}, {kind}: {verdict:?}");
    }
}

#[test]
fn every_row_of_the_table_of_corruptions_is_found_at_least_once() {
    for (row, (kind, corrupt)) in CORRUPTIONS.iter().enumerate() {
        let mut world = World::new(6);
        corrupt(&mut world, 3, 9);
        let verdict = world.judge();
        assert_eq!(verdict.errors_by_kind.get(*kind), Some(&1), "row {row}: {verdict:?}");
    }
}

#[test]
fn a_missing_sample_is_lost_and_a_second_copy_is_a_duplicate() {
    let mut world = World::new(4);
    let gone = world.delivered.remove(2);
    let verdict = world.judge();
    assert_eq!((verdict.lost, verdict.duplicated, verdict.provenance_errors), (1, 0, 0));
    assert!(verdict.examples[0].contains("k1/0 never came"), "{:?}", verdict.examples);
    world.delivered.push(gone.clone());
    world.delivered.push(gone);
    let verdict = world.judge();
    assert_eq!((verdict.lost, verdict.duplicated, verdict.provenance_errors), (0, 1, 0));
}

#[test]
fn an_abandoned_or_cancelled_sample_is_lost_unless_partial_ones_are_allowed() {
    let mut world = World::new(4);
    world.delivered[0].finish = Finish::Abandoned as i32;
    assert_eq!(world.judge().lost, 1);
    let asked = &world.asked[0];
    world.delivered[0] = generate(asked, 0, 15);
    world.delivered[0].finish = Finish::Cancelled as i32;
    assert_eq!(world.judge().lost, 1);
    let verdict = judge(&world.job, &world.asked, &world.weights, &world.delivered, true);
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!((verdict.samples_partial, verdict.samples_verified), (1, 7));
}

#[test]
fn the_files_say_the_same_after_writing_and_reading_and_a_torn_end_is_an_error() {
    let world = World::new(4);
    let dir = tempfile::tempdir().unwrap();
    let path = |name| dir.path().join(name);
    let mut prompts = records::PromptLog::create(&path("p"), &world.job).unwrap();
    world.asked.iter().for_each(|asked| prompts.append(asked).unwrap());
    let mut weights = records::WeightsLog::create(&path("w")).unwrap();
    world.weights.iter().for_each(|line| weights.append(line).unwrap());
    let mut log = records::TrajectoryLog::create(&path("t")).unwrap();
    world.delivered.iter().for_each(|t| log.append_message(t).unwrap());
    log.flush().unwrap();
    let args = VerifyArgs {
        trajectories: path("t"),
        prompts: path("p"),
        weights: path("w"),
        allow_partial: false,
    };
    assert_eq!(run(&args).unwrap(), world.judge());
    let bytes = std::fs::read(path("t")).unwrap();
    std::fs::write(path("t"), &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(run(&args), Err(RecordError::Record { .. })));
}
