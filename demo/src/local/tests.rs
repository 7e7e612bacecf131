use super::*;
use crate::model::{Model, ModelConfig};
use crate::task::{Strand, Task};

fn weights() -> Weights {
    let task = Strand::new(1);
    Model::random(ModelConfig::for_task(&task), 3).unwrap().snapshot().unwrap()
}

fn request(i: u64) -> Request {
    let prompt = Strand::new(1).train_problem(i).prompt;
    Request { prompt, kept: Vec::new(), kept_logprobs: Vec::new(), seed: i, max_tokens: 13 }
}

#[test]
fn a_sample_resumed_from_any_of_its_tokens_takes_the_same_path() {
    let weights = weights();
    let whole: Vec<Answer> =
        generate(&weights, &[request(1), request(2)], Choice::Sampled).unwrap();
    for (i, answer) in whole.iter().enumerate() {
        for cut in 0..answer.tokens.len() {
            let resumed = Request {
                kept: answer.tokens[..cut].to_vec(),
                kept_logprobs: answer.logprobs[..cut].to_vec(),
                ..request(i as u64 + 1)
            };
            let again = generate(&weights, &[resumed], Choice::Sampled).unwrap();
            assert_eq!(again[0].tokens, answer.tokens);
        }
    }
}

#[test]
fn greedy_answers_and_their_logprobs_agree_with_the_training_pass() {
    let weights = weights();
    let answer = generate(&weights, &[request(7)], Choice::Greedy).unwrap().remove(0);
    let prompt = request(7).prompt;
    let mut ids = prompt.clone();
    ids.extend(&answer.tokens);
    let rows: Vec<u32> = (0..answer.tokens.len()).map(|i| (prompt.len() - 1 + i) as u32).collect();
    let rows = Tensor::new(rows, weights.embed.device()).unwrap();
    let len = ids.len();
    let logits = weights.logits_at(&id_tensor(ids, len).unwrap(), &rows).unwrap();
    for (i, row) in logits.to_vec2::<f32>().unwrap().iter().enumerate() {
        let (token, logprob) = choose(row, Choice::Greedy, 0.0);
        assert_eq!(token, answer.tokens[i]);
        assert!((logprob - answer.logprobs[i]).abs() < 1e-5);
    }
}

#[test]
fn a_sample_that_is_already_at_its_end_stays_as_it_is() {
    let weights = weights();
    let ended = Request { kept: vec![3, 0], kept_logprobs: vec![-1.0, -2.0], ..request(1) };
    let answer = generate(&weights, &[ended], Choice::Sampled).unwrap().remove(0);
    assert_eq!(answer, Answer { tokens: vec![3, 0], logprobs: vec![-1.0, -2.0] });
}
