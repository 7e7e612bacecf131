//! The task that the model is to learn, and the exact verifier of its answers.
//!
//! Owns the strand task (vocabulary, problems, held-out set, verifier) and the [`Task`] seam.
//! Does not know how answers are generated or learnt from.
//!
//! Strand task: the prompt is a DNA strand of [`STRAND_BASES`] bases, the answer its complementary
//! strand (A-T, C-G), ended by the model's own EOS. Whether position i is right depends on token i
//! alone, so its reward is exact and immediate.

use crate::rng::{hash_bytes, mix, unit};

/// Length of a strand, in bases.
pub const STRAND_BASES: usize = 16;

const EOS: u32 = 0;
const BOS: u32 = 1;
const SEP: u32 = 2;
const FIRST_BASE: u32 = 3;
const BASES: [char; 4] = ['A', 'C', 'G', 'T'];
/// One strand in this many is held out of training, decided by the strand's own hash.
const HELD_OUT_SHARE: u64 = 8;
/// First index of the warm-up's problems, far from any training problem.
const FORM_STREAM: u64 = 1 << 40;
/// Share of positions of a warm-up answer that copy the prompt.
const COPIED_SHARE: f64 = 0.5;

/// One question, and what is needed to grade its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Token ids of the question, with BOS.
    pub prompt: Vec<u32>,
    /// The whole expected answer: tokens with EOS for the strand task, the number's bytes for text.
    pub expected: Vec<u32>,
}

/// The verdict on one answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// Reward, 0 or 1, of each generated token; empty if the verifier grades only the whole answer.
    pub per_token: Vec<f32>,
    /// Reward in [0, 1]: share of positions that are right, or right/wrong as a whole.
    pub reward: f32,
    /// True if the whole answer is right, with its EOS.
    pub exact: bool,
}

/// The special ids and sizes that a model for this task needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vocabulary {
    /// Number of token ids.
    pub size: usize,
    /// Token id that begins a prompt.
    pub bos: u32,
    /// Token id that ends an answer.
    pub eos: u32,
}

/// Problems to learn from, problems held out, and the verifier of answers.
pub trait Task: Send + Sync {
    /// Name of the task, for the report.
    fn name(&self) -> &'static str;
    /// Token ids that the task uses.
    fn vocabulary(&self) -> Vocabulary;
    /// Upper bound of a prompt's length in tokens.
    fn max_prompt_tokens(&self) -> usize;
    /// Longest generated answer in tokens, EOS included.
    fn max_answer_tokens(&self) -> usize;
    /// The training problem `index`; never one of the held-out set.
    fn train_problem(&self, index: u64) -> Problem;
    /// The first `count` held-out problems, always the same; fewer if the task has fewer.
    fn held_out(&self, count: usize) -> Vec<Problem>;
    /// A prompt with an answer of the right form and the wrong content, for the warm-up.
    fn form_example(&self, index: u64) -> Problem;
    /// Grades `answer`.
    fn score(&self, problem: &Problem, answer: &[u32]) -> Score;
    /// Tokens as text for people.
    fn show(&self, tokens: &[u32]) -> String;
}

/// The strand task.
pub struct Strand {
    seed: u64,
}

impl Strand {
    /// Makes the task; `seed` decides its problems.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The `index`-th strand of the train or the held-out side, by rejection over one stream.
    fn draw(&self, side: Side, index: u64) -> Problem {
        let key = mix(mix(self.seed, side as u64), index);
        let bases = (0u64..)
            .map(|attempt| strand(mix(key, attempt)))
            .find(|bases| side_of(bases) == side)
            .expect("both sides hold a fixed share of all strands");
        problem(&bases)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Train,
    HeldOut,
}

impl Task for Strand {
    fn name(&self) -> &'static str {
        "strand"
    }

    fn vocabulary(&self) -> Vocabulary {
        Vocabulary { size: FIRST_BASE as usize + BASES.len(), bos: BOS, eos: EOS }
    }

    fn max_prompt_tokens(&self) -> usize {
        STRAND_BASES + 2
    }

    fn max_answer_tokens(&self) -> usize {
        STRAND_BASES + 1
    }

    fn train_problem(&self, index: u64) -> Problem {
        self.draw(Side::Train, index)
    }

    fn held_out(&self, count: usize) -> Vec<Problem> {
        (0..count as u64).map(|i| self.draw(Side::HeldOut, i)).collect()
    }

    /// A problem whose answer is half a copy of the prompt and half noise. A copied base is never its own complement,
    /// so the habit that this teaches scores below chance; it only shows where to look and when to stop.
    fn form_example(&self, index: u64) -> Problem {
        let problem = self.draw(Side::Train, FORM_STREAM + index);
        let key = mix(mix(self.seed, FORM_STREAM), index);
        let noise = strand(key);
        let copied = |i: usize| unit(mix(key, FORM_STREAM), i as u64) < COPIED_SHARE;
        let prompt = &problem.prompt[1..];
        let mut expected: Vec<u32> =
            (0..STRAND_BASES).map(|i| if copied(i) { prompt[i] } else { noise[i] }).collect();
        expected.push(EOS);
        Problem { prompt: problem.prompt, expected }
    }

    fn score(&self, problem: &Problem, answer: &[u32]) -> Score {
        let right =
            |(i, token): (usize, &u32)| f32::from(u8::from(problem.expected.get(i) == Some(token)));
        let per_token: Vec<f32> = answer.iter().enumerate().map(right).collect();
        let reward = per_token.iter().sum::<f32>() / problem.expected.len() as f32;
        Score { per_token, reward, exact: answer == problem.expected }
    }

    fn show(&self, tokens: &[u32]) -> String {
        tokens
            .iter()
            .map(|t| match *t {
                EOS => '.',
                BOS => '^',
                SEP => '>',
                base => BASES.get((base - FIRST_BASE) as usize).copied().unwrap_or('?'),
            })
            .collect()
    }
}

fn strand(key: u64) -> Vec<u32> {
    (0..STRAND_BASES as u64).map(|i| FIRST_BASE + (mix(key, i) >> 62) as u32).collect()
}

fn side_of(bases: &[u32]) -> Side {
    let bytes: Vec<u8> = bases.iter().map(|b| *b as u8).collect();
    match mix(hash_bytes(&bytes), 0) % HELD_OUT_SHARE {
        0 => Side::HeldOut,
        _ => Side::Train,
    }
}

fn problem(bases: &[u32]) -> Problem {
    let mut prompt = vec![BOS];
    prompt.extend(bases);
    prompt.push(SEP);
    let complement = |base: &u32| FIRST_BASE + (BASES.len() as u32 - 1) - (base - FIRST_BASE);
    let mut expected: Vec<u32> = bases.iter().map(complement).collect();
    expected.push(EOS);
    Problem { prompt, expected }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_answer_is_the_complementary_strand_and_eos() {
        let task = Strand::new(1);
        let p = task.train_problem(0);
        let asked = task.show(&p.prompt);
        let answer = task.show(&p.expected);
        for (a, b) in asked[1..=STRAND_BASES].chars().zip(answer.chars()) {
            assert!(["AT", "TA", "CG", "GC"].contains(&format!("{a}{b}").as_str()), "{a}{b}");
        }
        assert!(answer.ends_with('.'));
        assert!(task.score(&p, &p.expected).exact);
    }

    #[test]
    fn problems_repeat_by_seed_and_the_sides_never_meet() {
        let task = Strand::new(3);
        assert_eq!(task.train_problem(17), Strand::new(3).train_problem(17));
        assert_ne!(task.train_problem(17), Strand::new(4).train_problem(17));
        let held: BTreeSet<_> = task.held_out(500).into_iter().map(|p| p.prompt).collect();
        assert!(held.len() > 495);
        assert!((0..5000).all(|i| !held.contains(&task.train_problem(i).prompt)));
    }

    #[test]
    fn the_warm_up_shows_the_form_and_answers_worse_than_chance() {
        let task = Strand::new(2);
        let right: usize = (0..400)
            .map(|i| {
                let shown = task.form_example(i);
                assert_eq!(shown.expected.len(), STRAND_BASES + 1);
                assert_eq!(shown.expected.last(), Some(&EOS));
                let wanted = problem(&shown.prompt[1..=STRAND_BASES]).expected;
                (0..STRAND_BASES).filter(|at| shown.expected[*at] == wanted[*at]).count()
            })
            .sum();
        let share = right as f64 / (400 * STRAND_BASES) as f64;
        assert!((share - 0.125).abs() < 0.02, "{share} of the shown bases are right");
    }

    #[test]
    fn a_wrong_an_early_and_a_missing_end_are_graded_by_position() {
        let task = Strand::new(1);
        let p = task.train_problem(5);
        let mut wrong = p.expected.clone();
        wrong[3] = EOS;
        let early = task.score(&p, &wrong[..4]);
        assert_eq!(early.per_token, [1.0, 1.0, 1.0, 0.0]);
        assert!(!early.exact);
        let whole = (STRAND_BASES + 1) as f32;
        assert!((early.reward - 3.0 / whole).abs() < 1e-6);
        let mut endless = p.expected.clone();
        *endless.last_mut().unwrap() = FIRST_BASE;
        assert!(!task.score(&p, &endless).exact);
    }
}
