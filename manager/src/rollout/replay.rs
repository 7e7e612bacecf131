//! What an engine cannot replay: state that is not in the tokens. `docs/replay.md` has the same table; a
//! test holds the two together.

use crate::event::Sampling;

/// One thing that a resume from prompt + kept tokens would not continue exactly.
pub struct Unreplayable {
    pub what: &'static str,
    pub why: &'static str,
    used: fn(&Sampling) -> bool,
}

pub const TABLE: &[Unreplayable] = &[
    Unreplayable {
        what: "presence_penalty",
        why: "counts output tokens of the request only; starts at zero again on resume",
        used: |sampling| sampling.presence_penalty != 0.0,
    },
    Unreplayable {
        what: "frequency_penalty",
        why: "counts output tokens of the request only; starts at zero again on resume",
        used: |sampling| sampling.frequency_penalty != 0.0,
    },
    Unreplayable {
        what: "repetition_penalty",
        why: "engines differ in whether the prompt counts; kept tokens become prompt on resume",
        used: |sampling| sampling.repetition_penalty != 1.0,
    },
    Unreplayable {
        what: "stop_strings",
        why: "the engine matches its own output only; a string over the seam would be missed",
        used: |sampling| !sampling.stop_strings.is_empty(),
    },
    Unreplayable {
        what: "extra",
        why: "grammars, thinking budgets and custom processors keep state that is not in the tokens",
        used: |sampling| !sampling.extra.is_empty(),
    },
];

/// What of this sampling cannot be replayed; such a sample restarts from its prompt, or is refused.
pub fn unreplayable(sampling: &Sampling) -> Vec<&'static Unreplayable> {
    TABLE.iter().filter(|row| (row.used)(sampling)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_in_the_docs_is_the_table_in_the_code() {
        let page = include_str!("../../../docs/replay.md");
        for row in TABLE {
            let line = format!("| `{}` | {} |", row.what, row.why);
            assert!(page.contains(&line), "docs/replay.md lacks the row\n{line}");
        }
        let rows = page.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(rows, TABLE.len(), "docs/replay.md has rows that the code does not know");
    }
}
