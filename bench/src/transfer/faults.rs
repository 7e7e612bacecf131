//! Figure I: faults that are really injected, each of which must end with the published bytes or with a clear refusal.

use std::sync::Arc;
use std::time::Duration;

use anabranch_transfer::wire::{BlobId, HEADER_BYTES, Header, Message, PROTO};
use anyhow::Context;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::lab::{LOCAL, Lab, Server};
use super::meddler::{Fault, Meddler};
use super::order::*;
use super::report::Figure;
use crate::progress;

const BYTES: u64 = 24 << 20;
const STREAMS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(60);

struct Stage<'a> {
    lab: &'a Lab,
    trainer: Server,
    receiver: Server,
    number: u64,
    cases: Vec<Value>,
    caught: u32,
}

/// Measures the figure.
pub async fn figures(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let trainer = lab.trainer(lab.local("i-trainer")?, LOCAL, false).await?;
    let receiver = lab.receiver(lab.local("i-receiver")?, LOCAL).await?;
    let mut stage = Stage { lab, trainer, receiver, number: 0, cases: Vec::new(), caught: 0 };
    let old = stage.old_image().await?;
    for (name, fault) in [
        ("bit flip", Fault::FlipBit),
        ("bit flip in a header", Fault::FlipHeader),
        ("truncation", Fault::Truncate),
        ("reordering of bytes", Fault::SwapBytes),
        ("reordering of chunks", Fault::SwapFrames),
        ("duplicate", Fault::Duplicate),
        ("stale version", Fault::Stale(Arc::clone(&old))),
        ("lying relay", Fault::Rubbish),
        ("lying manifest", Fault::Manifest),
    ] {
        progress::line(&format!("figure I: {name}"));
        stage.meddled(name, &fault, false).await?;
        stage.meddled(name, &fault, true).await?;
    }
    progress::line("figure I: torn source, version that is gone, foreign writer");
    stage.torn().await?;
    stage.gone().await?;
    stage.foreign().await?;
    stage.trainer.host.end().await?;
    stage.receiver.host.end().await?;
    let injected = stage.cases.len() as u32;
    let note = format!("{} of {injected} faults", stage.caught);
    let value = f64::from(stage.caught) / f64::from(injected);
    let detail = json!({"note": note, "cases": stage.cases});
    Ok(vec![Figure::at_least("I.caught", value, 1.0, "of injected", detail)])
}

impl Stage<'_> {
    /// Fetches through a source that lies, alone or together with an honest one.
    async fn meddled(&mut self, name: &str, fault: &Fault, honest: bool) -> anyhow::Result<()> {
        let issued = self.publish().await?;
        let meddler = Meddler::start(&self.trainer.addr, fault.clone()).await?;
        let outcome = self.fetch(&issued, Some(&meddler.addr), honest).await;
        let with = if honest { "beside an honest source" } else { "alone" };
        self.judge(&format!("{name}, {with}"), meddler.injected(), outcome, honest);
        Ok(())
    }

    /// Gives the source's memory to other versions while it is read.
    async fn torn(&mut self) -> anyhow::Result<()> {
        let issued = self.publish().await?;
        let meddler = Meddler::start(&self.trainer.addr, Fault::Slow).await?;
        let order = self.order(&issued, Some(&meddler.addr), false)?;
        let mut pending = self.receiver.host.send(Order::Fetch(order)).await?;
        pending.reaches(1).await;
        for _ in 0..2 {
            self.publish().await?;
        }
        let outcome = match pending.answer::<Fetched>().await {
            Ok(_) => self.compare(&issued).await.map(|()| "the published bytes".to_owned()),
            Err(error) => Err(error),
        };
        self.judge("torn source", meddler.injected(), outcome, false);
        Ok(())
    }

    /// Fetches with a grant for a version that the source does not hold any more.
    async fn gone(&mut self) -> anyhow::Result<()> {
        let issued = self.publish().await?;
        for _ in 0..2 {
            self.publish().await?;
        }
        let outcome = self.fetch(&issued, None, true).await;
        self.judge("stale version asked for", 1, outcome, false);
        Ok(())
    }

    /// Lets somebody without a grant write to the ports of both while a version arrives.
    async fn foreign(&mut self) -> anyhow::Result<()> {
        let issued = self.publish().await?;
        let meddler = Meddler::start(&self.trainer.addr, Fault::Slow).await?;
        let order = self.order(&issued, Some(&meddler.addr), false)?;
        let mut pending = self.receiver.host.send(Order::Fetch(order)).await?;
        pending.reaches(1).await;
        let ports = [self.receiver.addr.clone(), self.trainer.addr.clone()];
        let mut told = Vec::new();
        for addr in &ports {
            for words in [Vec::new(), greeting(false), greeting(true)] {
                told.push(intrude(addr, words).await?);
            }
        }
        let fetched: Fetched = pending.answer().await?;
        anyhow::ensure!(fetched.bytes == issued.image_bytes, "another size");
        let same = self.compare(&issued).await;
        let refused = told.iter().all(|answer| answer.starts_with("refused"));
        let outcome = same.and_then(|()| match refused {
            true => Ok("the published bytes".to_owned()),
            false => anyhow::bail!("WRONG: let in: {told:?}"),
        });
        self.judge("foreign writer", told.len() as u64, outcome, true);
        Ok(())
    }

    async fn publish(&mut self) -> anyhow::Result<Issued> {
        self.number += 1;
        let (number, bytes) = (self.number, self.lab.size(BYTES));
        let order = Publish { number, bytes, seed: number, changed: None };
        self.trainer.host.ask(Order::Publish(order)).await
    }

    async fn old_image(&mut self) -> anyhow::Result<Arc<Vec<u8>>> {
        let issued = self.publish().await?;
        let order = self.order(&issued, None, true)?;
        let fetched: Fetched = self.receiver.host.ask(Order::Fetch(order)).await?;
        let image = std::fs::read(fetched.dir.join(anabranch_transfer::MODEL_FILE));
        Ok(Arc::new(image.context("reading the first version")?))
    }

    fn order(&self, issued: &Issued, liar: Option<&str>, honest: bool) -> anyhow::Result<Fetch> {
        let (lab, version) = (self.lab, issued.version.clone());
        let mut sources = Vec::new();
        if let Some(addr) = liar {
            let source = lab.source(&self.trainer, &version, "i-receiver", &[])?;
            sources.push(Source { holder: "liar".into(), addr: addr.to_owned(), ..source });
        }
        if honest {
            sources.push(lab.source(&self.trainer, &version, "i-receiver", &[])?);
        }
        Ok(Fetch { version, sources, stripe_count: 0, streams: STREAMS })
    }

    async fn fetch(
        &self,
        issued: &Issued,
        liar: Option<&str>,
        honest: bool,
    ) -> anyhow::Result<String> {
        let order = Order::Fetch(self.order(issued, liar, honest)?);
        let fetching = self.receiver.host.ask::<Fetched>(order);
        let fetched =
            tokio::time::timeout(PATIENCE, fetching).await.context("WRONG: it hangs")??;
        self.compare(issued).await?;
        Ok(format!("the published bytes; {}", fetched.queue))
    }

    async fn compare(&self, issued: &Issued) -> anyhow::Result<()> {
        let digest: String = self.receiver.host.ask(Order::Digest).await?;
        anyhow::ensure!(digest == issued.digest, "WRONG: other bytes than published");
        Ok(())
    }

    /// Notes a case. It is caught if the right bytes came, or if they were refused and no honest source could have
    /// helped.
    fn judge(
        &mut self,
        name: &str,
        injected: u64,
        outcome: anyhow::Result<String>,
        must_arrive: bool,
    ) {
        let told = outcome.as_ref().map_or_else(|e| format!("{e:#}"), Clone::clone);
        let right = outcome.is_ok() || !(must_arrive || told.contains("WRONG"));
        let caught = right && injected > 0;
        self.caught += u32::from(caught);
        let end: String = told.chars().take(300).collect();
        self.cases.push(json!({"fault": name, "injected": injected, "caught": caught, "end": end}));
    }
}

/// Greeting with a grant that nobody minted: as a receiver, or as a source that dials.
fn greeting(offer: bool) -> Vec<u8> {
    let grant = vec![7; 160];
    let message = match offer {
        true => Message::Offer { proto: PROTO, grant },
        false => Message::Hi { proto: PROTO, base: Default::default(), grant },
    };
    message.to_bytes()
}

/// Sends `words` and then chunks; returns how that was answered.
async fn intrude(addr: &str, mut words: Vec<u8>) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(addr).await?;
    for index in 0..4 {
        words.extend(Message::Chunk { blob: BlobId::Image, index, len: 4096 }.to_bytes());
        words.extend([0xee; 4096]);
    }
    // It may hang up in the middle, which is an answer too.
    stream.write_all(&words).await.ok();
    let mut head = [0; HEADER_BYTES];
    let read = tokio::time::timeout(PATIENCE, stream.read_exact(&mut head)).await?;
    if read.is_err() {
        return Ok("refused: closed".to_owned());
    }
    let header = Header::decode(&head)?;
    let mut body = vec![0; header.body_bytes()];
    stream.read_exact(&mut body).await?;
    Ok(match header.finish(&body)? {
        Message::Fail { code, text } => format!("refused: {code:?}: {text}"),
        other => format!("answered with {other:?}"),
    })
}
