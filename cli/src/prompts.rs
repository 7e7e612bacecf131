//! Reading of prompts: one JSON object a line, text or ids. Everything is checked before anything is sent, and every
//! complaint names its line.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::{Path, PathBuf};

use anabranch_runtime::Exit;
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::failure::{Failure, OrExit};

/// Complaints that are shown; more are only counted.
const SHOWN: usize = 10;

/// One prompt of the input.
#[derive(Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Key of the group.
    pub key: String,
    /// Token ids.
    pub ids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: Option<Given>,
    input_ids: Option<Vec<u32>>,
    key: Option<String>,
}

/// Value of `"prompt"`: text, or the ids themselves.
#[derive(Deserialize)]
#[serde(untagged)]
enum Given {
    Text(String),
    Ids(Vec<u32>),
}

/// Loads a tokenizer from a file, or from the `tokenizer.json` of a directory.
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer, Failure> {
    let file: PathBuf = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    Tokenizer::from_file(&file).map_err(|error| {
        let text = format!(
            "cannot read the tokenizer {}: {error}. --tokenizer takes a tokenizer.json or its directory",
            file.display()
        );
        Failure::usage(text)
    })
}

/// Reads all prompts. Lines without a key get one that begins with `run`. Fails with all complaints if a line is wrong.
pub fn read(
    input: impl BufRead,
    origin: &str,
    tokenizer: Option<&Tokenizer>,
    run: &str,
) -> Result<Vec<Prompt>, Failure> {
    let mut prompts = Vec::new();
    let mut bad = Vec::new();
    let mut keys = BTreeMap::new();
    for (index, line) in input.lines().enumerate() {
        let line =
            line.map_err(|error| format!("cannot read {origin}: {error}")).or_exit(Exit::Io)?;
        let number = index + 1;
        if line.trim().is_empty() {
            bad.push(format!("{origin}:{number}: the line is empty"));
            continue;
        }
        match prompt(&line, number, tokenizer, run) {
            Ok(prompt) => match keys.insert(prompt.key.clone(), number) {
                Some(first) => bad.push(format!(
                    "{origin}:{number}: the key {:?} stands on line {first} already",
                    prompt.key
                )),
                None => prompts.push(prompt),
            },
            Err(why) => bad.push(format!("{origin}:{number}: {why}")),
        }
    }
    check(prompts, &bad, origin)
}

fn check(prompts: Vec<Prompt>, bad: &[String], origin: &str) -> Result<Vec<Prompt>, Failure> {
    if !bad.is_empty() {
        let more = bad.len().saturating_sub(SHOWN);
        let mut text = bad[..bad.len().min(SHOWN)].join("\n");
        if more > 0 {
            text += &format!("\n... and {more} more");
        }
        text += "\nnothing was sent: correct or remove these lines";
        return Err(Failure::usage(text));
    }
    if prompts.is_empty() {
        return Err(Failure::usage(format!("{origin} has no prompts")));
    }
    Ok(prompts)
}

fn prompt(
    line: &str,
    number: usize,
    tokenizer: Option<&Tokenizer>,
    run: &str,
) -> Result<Prompt, String> {
    let line: Line = serde_json::from_str(line).map_err(|error| {
        format!(
            "not a prompt ({error}); write {{\"prompt\": \"text\"}} or {{\"input_ids\": [1, 2]}}"
        )
    })?;
    let ids = match (line.prompt, line.input_ids) {
        (Some(Given::Text(text)), None) => encode(&text, tokenizer)?,
        (Some(Given::Ids(ids)), None) | (None, Some(ids)) => ids,
        (Some(_), Some(_)) => return Err("both \"prompt\" and \"input_ids\"; give one".into()),
        (None, None) => return Err("neither \"prompt\" nor \"input_ids\"".into()),
    };
    if ids.is_empty() {
        return Err("the prompt is empty; it needs at least one token".into());
    }
    let key = line.key.unwrap_or_else(|| format!("{run}-{number}"));
    if key.is_empty() {
        return Err("the key is empty; leave it out to get one made".into());
    }
    Ok(Prompt { key, ids })
}

fn encode(text: &str, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, String> {
    if text.is_empty() {
        return Err("the prompt is empty; it needs at least one token".into());
    }
    let tokenizer =
        tokenizer.ok_or("a text prompt needs --tokenizer (a tokenizer.json or its directory)")?;
    let encoding =
        tokenizer.encode(text, true).map_err(|error| format!("not tokenized: {error}"))?;
    Ok(encoding.get_ids().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<Prompt>, String> {
        read(text.as_bytes(), "p.jsonl", None, "run").map_err(|failure| {
            assert_eq!(failure.exit, Exit::Usage);
            failure.text
        })
    }

    #[test]
    fn ids_come_through_and_missing_keys_are_made() {
        let text = "{\"input_ids\": [1, 2], \"key\": \"a\"}\n{\"prompt\": [3]}\n";
        let prompts = read_text(text).expect("sound");
        assert_eq!(prompts[0], Prompt { key: "a".into(), ids: vec![1, 2] });
        assert_eq!(prompts[1], Prompt { key: "run-2".into(), ids: vec![3] });
    }

    #[test]
    fn every_bad_line_is_named_and_nothing_is_returned() {
        let text = "{\"input_ids\": []}\n\n{\"prompt\": \"\"}\n{\"prompt\": \"hi\"}\nnope\n\
                    {\"input_ids\": [1], \"prompt\": [1]}\n{\"input_ids\": [-1]}\n{\"ids\": [1]}\n{}\n";
        let said = read_text(text).expect_err("all are bad");
        for line in [
            "p.jsonl:1: the prompt is empty",
            "p.jsonl:2: the line is empty",
            "p.jsonl:3: the prompt is empty",
            "p.jsonl:4: a text prompt needs --tokenizer",
            "p.jsonl:5: not a prompt",
            "p.jsonl:6: both",
            "p.jsonl:7: not a prompt",
            "p.jsonl:8: not a prompt (unknown field `ids`",
            "p.jsonl:9: neither",
            "nothing was sent",
        ] {
            assert!(said.contains(line), "{line} in\n{said}");
        }
    }

    #[test]
    fn keys_are_unique_and_long_lists_are_cut() {
        let twice = "{\"input_ids\": [1], \"key\": \"a\"}\n".repeat(2);
        assert!(read_text(&twice).expect_err("twice").contains("stands on line 1 already"));
        assert!(read_text(&"x\n".repeat(15)).expect_err("bad").contains("... and 5 more"));
        assert!(read_text("").expect_err("nothing").contains("no prompts"));
    }
}
