//! The model that a job trains and its engines serve.

use crate::invalid::Invalid;
use crate::pb;

/// Facts about a model that both sides must agree on. Empty texts and lists, and zeros, mean "not known":
/// a job takes what it does not know from its first engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// Name of the model, such as its path or its name on a hub.
    pub id: String,
    /// Digest of the tokenizer's files. Engines with another one are refused.
    pub tokenizer_digest: String,
    /// Size of the vocabulary; token ids at or above it are foreign.
    pub vocab: u32,
    /// Most tokens of prompt and output together.
    pub max_context: u32,
    /// Token ids that end a sample.
    pub eos_ids: Vec<u32>,
    /// Element type of the weights, such as `bfloat16`. For people; nothing is decided by it.
    pub dtype: String,
    /// Quantization method; empty for none. For people; nothing is decided by it.
    pub quant: String,
}

// === impl Model ===

impl Model {
    /// Refuses an EOS id outside the vocabulary, where that is known.
    pub fn check(&self) -> Result<(), Invalid> {
        let outside = |id: &&u32| self.vocab != 0 && **id >= self.vocab;
        match self.eos_ids.iter().find(outside) {
            Some(id) => {
                let what = format!(
                    "{id} is outside the vocabulary of {}; ids are below its size",
                    self.vocab
                );
                Err(Invalid::rule("model.eos_ids", what))
            }
            None => Ok(()),
        }
    }
}

impl TryFrom<pb::Model> for Model {
    type Error = Invalid;

    fn try_from(wire: pb::Model) -> Result<Self, Invalid> {
        let pb::Model { id, tokenizer_digest, vocab, max_context, eos_ids, dtype, quant } = wire;
        let model = Self { id, tokenizer_digest, vocab, max_context, eos_ids, dtype, quant };
        model.check()?;
        Ok(model)
    }
}

impl From<Model> for pb::Model {
    fn from(model: Model) -> Self {
        let Model { id, tokenizer_digest, vocab, max_context, eos_ids, dtype, quant } = model;
        Self { id, tokenizer_digest, vocab, max_context, eos_ids, dtype, quant }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_goes_over_the_wire_and_back_unless_its_eos_is_no_token() {
        let model = Model {
            id: "m".into(),
            vocab: 10,
            eos_ids: vec![9],
            dtype: "bfloat16".into(),
            ..Model::default()
        };
        assert_eq!(Model::try_from(pb::Model::from(model.clone())), Ok(model.clone()));
        let odd = Model { eos_ids: vec![1, 10], ..model.clone() };
        assert_eq!(
            odd.check().expect_err("outside").to_string(),
            "model.eos_ids: 10 is outside the vocabulary of 10; ids are below its size"
        );
        assert_eq!(Model { vocab: 0, ..odd }.check(), Ok(()));
    }
}
