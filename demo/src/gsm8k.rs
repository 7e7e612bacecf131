//! GSM8K-style word problems as workload: real prompt lengths, real grading, no hope of learning.
//!
//! Owns reading the file, byte-level tokens and the numeric verifier. A small model from random
//! weights does not learn arithmetic in a demo; this feeds the fleet, it shows no curve.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use crate::rng::{hash_bytes, mix};
use crate::task::{Problem, Score, Task, Vocabulary};

const EOS: u32 = 0;
const BOS: u32 = 1;
const FIRST_BYTE: u32 = 2;
/// Longest question that is used: attention over longer ones would dominate the run.
const MAX_QUESTION_BYTES: usize = 256;
/// Longest answer; one token is one byte.
const MAX_ANSWER_TOKENS: usize = 32;
/// Text between a question and its answer.
const CUE: &[u8] = b"\nAnswer: ";
/// One problem in this many is held out of training.
const HELD_OUT_SHARE: u64 = 8;

/// Reason why the problems cannot be used.
#[derive(Debug, Error)]
pub enum Gsm8kError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    /// A line is no JSON object with the two fields.
    #[error(
        "{path}, line {line}: {source}; expected one JSON object a line with `question` and `answer`"
    )]
    Line { path: PathBuf, line: usize, source: serde_json::Error },
    /// An answer has no number after `####`.
    #[error("{path}, line {line}: the answer has no number after ####")]
    NoNumber { path: PathBuf, line: usize },
    /// Too few problems are short enough.
    #[error(
        "{path}: of {read} problems, {train} to train on and {held_out} to hold out are at most \
         {MAX_QUESTION_BYTES} bytes long; both sides need at least one"
    )]
    TooFew { path: PathBuf, read: usize, train: usize, held_out: usize },
}

/// Problems of one file, split into those to train on and those held out.
pub struct Gsm8k {
    seed: u64,
    train: Vec<Problem>,
    held_out: Vec<Problem>,
    skipped: usize,
}

#[derive(Deserialize)]
struct Line {
    question: String,
    answer: String,
}

impl Gsm8k {
    /// Reads the problems from a file of JSON lines; `seed` decides which of them each step draws.
    pub fn read(path: &Path, seed: u64) -> Result<Self, Gsm8kError> {
        let text = fs::read_to_string(path)
            .map_err(|source| Gsm8kError::Read { path: path.to_owned(), source })?;
        let mut task = Self { seed, train: Vec::new(), held_out: Vec::new(), skipped: 0 };
        for (at, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
            task.add_line(path, at + 1, text)?;
        }
        let (train, held_out) = (task.train.len(), task.held_out.len());
        if train == 0 || held_out == 0 {
            let read = train + held_out + task.skipped;
            return Err(Gsm8kError::TooFew { path: path.to_owned(), read, train, held_out });
        }
        Ok(task)
    }

    /// Problems left out because their question is too long.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    fn add_line(&mut self, path: &Path, line: usize, text: &str) -> Result<(), Gsm8kError> {
        let parsed: Line = serde_json::from_str(text).map_err(|source| Gsm8kError::Line {
            path: path.to_owned(),
            line,
            source,
        })?;
        let number = parsed.answer.rsplit_once("####").map(|(_, number)| plain(number));
        let number = number
            .filter(|n| n.parse::<f64>().is_ok())
            .ok_or_else(|| Gsm8kError::NoNumber { path: path.to_owned(), line })?;
        if parsed.question.len() > MAX_QUESTION_BYTES {
            self.skipped += 1;
            return Ok(());
        }
        let held_out =
            mix(hash_bytes(parsed.question.as_bytes()), 0).is_multiple_of(HELD_OUT_SHARE);
        let side = if held_out { &mut self.held_out } else { &mut self.train };
        side.push(problem(&parsed.question, &number));
        Ok(())
    }
}

impl Task for Gsm8k {
    fn name(&self) -> &'static str {
        "gsm8k"
    }

    fn vocabulary(&self) -> Vocabulary {
        Vocabulary { size: FIRST_BYTE as usize + 256, bos: BOS, eos: EOS }
    }

    fn max_prompt_tokens(&self) -> usize {
        1 + MAX_QUESTION_BYTES + CUE.len()
    }

    fn max_answer_tokens(&self) -> usize {
        MAX_ANSWER_TOKENS
    }

    fn train_problem(&self, index: u64) -> Problem {
        self.train[(mix(self.seed, index) % self.train.len() as u64) as usize].clone()
    }

    /// The first `count` held-out problems; fewer if the file has fewer.
    fn held_out(&self, count: usize) -> Vec<Problem> {
        self.held_out.iter().take(count).cloned().collect()
    }

    /// A problem with the number of another problem.
    fn form_example(&self, index: u64) -> Problem {
        let expected = self.train_problem(index + 1).expected;
        Problem { expected, ..self.train_problem(index) }
    }

    fn score(&self, problem: &Problem, answer: &[u32]) -> Score {
        let number = |tokens: &[u32]| plain(&self.show(tokens)).parse::<f64>().ok();
        let ended = answer.last() == Some(&EOS);
        let exact = ended && number(answer).is_some_and(|n| Some(n) == number(&problem.expected));
        Score { per_token: Vec::new(), reward: f32::from(u8::from(exact)), exact }
    }

    fn show(&self, tokens: &[u32]) -> String {
        let byte = |t: &u32| t.checked_sub(FIRST_BYTE).and_then(|b| u8::try_from(b).ok());
        String::from_utf8_lossy(&tokens.iter().filter_map(byte).collect::<Vec<u8>>()).into_owned()
    }
}

/// A number without spaces, dollar signs and thousands separators.
fn plain(number: &str) -> String {
    number.trim().replace([',', '$'], "")
}

fn problem(question: &str, number: &str) -> Problem {
    let tokens = |bytes: &[u8]| bytes.iter().map(|b| FIRST_BYTE + u32::from(*b)).collect();
    let mut prompt = vec![BOS];
    prompt.extend::<Vec<u32>>(tokens(question.as_bytes()));
    prompt.extend::<Vec<u32>>(tokens(CUE));
    let mut expected: Vec<u32> = tokens(number.as_bytes());
    expected.push(EOS);
    Problem { prompt, expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(lines: &[String]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("problems.jsonl");
        fs::write(&path, lines.join("\n")).unwrap();
        (dir, path)
    }

    fn line(i: usize, answer: &str) -> String {
        format!(r#"{{"question": "What is problem {i}?", "answer": "{answer}"}}"#)
    }

    #[test]
    fn problems_are_read_split_and_graded_by_their_number() {
        let lines: Vec<String> = (0..64).map(|i| line(i, "Thus.\\n#### 1,234")).collect();
        let (_dir, path) = file(&lines);
        let task = Gsm8k::read(&path, 1).unwrap();
        assert_eq!(task.train.len() + task.held_out.len(), 64);
        let p = task.train_problem(3);
        assert!(task.show(&p.prompt).ends_with("Answer: "));
        assert!(task.score(&p, &p.expected).exact);
        let spelt = |text: &str| problem("", text).expected;
        assert!(task.score(&p, &spelt(" 1234.0")).exact);
        assert!(!task.score(&p, &spelt("1235")).exact);
        assert!(!task.score(&p, &spelt("1234")[..4]).exact, "cut before its end");
        assert!(task.held_out(1000).iter().all(|h| !task.train.contains(h)));
    }

    #[test]
    fn a_bad_line_is_named_with_its_number() {
        let (_dir, path) = file(&[line(0, "#### 3"), "{\"question\": 3}".to_owned()]);
        let error = Gsm8k::read(&path, 1).err().unwrap().to_string();
        assert!(error.contains("line 2") && error.contains("question"), "{error}");
        let (_dir, path) = file(&[line(0, "three")]);
        let error = Gsm8k::read(&path, 1).err().unwrap().to_string();
        assert!(error.contains("line 1") && error.contains("####"), "{error}");
    }

    #[test]
    fn long_questions_are_left_out_and_counted() {
        let mut lines: Vec<String> = (0..64).map(|i| line(i, "#### 5")).collect();
        lines.push(line(0, "#### 5").replace("What", &"What ".repeat(100)));
        let (_dir, path) = file(&lines);
        assert_eq!(Gsm8k::read(&path, 1).unwrap().skipped(), 1);
    }
}
