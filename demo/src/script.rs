//! The script of the run: which engine attaches, is killed or is drained, and with which outcome. Owns the cues and
//! their wording. The cluster starts and signals the processes.

use std::time::{Duration, Instant};

use crate::cluster::{Cluster, ClusterError, Place};
use crate::progress::View;
use crate::report::{Happening, HappeningKind, Phase};
use crate::watch::{Story, WatchError, Watcher};

/// Longest time that a kill or drain waits for samples on its engine.
const NOTICE: Duration = Duration::from_secs(3);
/// Time between two looks at the manager's state.
const LOOK: Duration = Duration::from_millis(10);
/// Samples on an engine that a kill or drain waits for, so that there is something to lose.
const WORTH_IT: u64 = 8;
/// Time after which these samples are in the middle of their answers.
const SOME_TOKENS: Duration = Duration::from_millis(150);
/// Time in which samples may still finish on an engine that drains.
const DRAIN: Duration = Duration::from_secs(3);

/// Reason why a cue could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// A process does not run, or cannot be signalled.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The manager did not answer, or not in time.
    #[error(transparent)]
    Watch(#[from] WatchError),
}

/// Kind of an event that the script causes for an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// The engine starts and attaches, at the start of the step.
    Attach,
    /// The engine gets SIGKILL in the middle of the step, while samples run on it.
    Kill,
    /// The engine is drained in the middle of the step.
    Drain,
}

/// One act of the script with its time and engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cue {
    /// Step in which the act is due.
    pub step: u64,
    /// Id of the engine.
    pub engine: &'static str,
    /// The act.
    pub act: Act,
}

/// Engines that run from the start, beside the colocated one.
pub const FIRST: [&str; 2] = ["engine-1", "engine-2"];

/// The acts of the demo; the last one needs a run of 8 steps.
pub const SCRIPT: [Cue; 4] = [
    Cue { step: 3, engine: "engine-3", act: Act::Attach },
    Cue { step: 5, engine: "engine-1", act: Act::Kill },
    Cue { step: 7, engine: "engine-2", act: Act::Drain },
    Cue { step: 8, engine: "engine-4", act: Act::Attach },
];

/// An act whose outcome is not known yet.
struct Open {
    cue: Cue,
    since_s: f64,
}

/// Acts that are still due, acts whose outcome is open, and what was told so far.
pub struct Script {
    cues: Vec<Cue>,
    open: Vec<Open>,
    told: Vec<Happening>,
    started: Instant,
}

/// The parts of the run that the script acts on.
pub struct Stage<'a> {
    /// The processes.
    pub cluster: &'a mut Cluster,
    /// The manager's events.
    pub watcher: &'a Watcher,
    /// Output on the screen.
    pub view: &'a View,
}

impl Script {
    /// Makes a script of `cues`; `started` is the story's time zero.
    pub fn new(cues: &[Cue], started: Instant) -> Self {
        Self { cues: cues.to_vec(), open: Vec::new(), told: Vec::new(), started }
    }

    /// Events told so far, in their order.
    pub fn told(&self) -> &[Happening] {
        &self.told
    }

    /// Cues that never came, because the run had too few steps.
    pub fn left(&self) -> &[Cue] {
        &self.cues
    }

    /// Starts the engines that are due at the start of `step`.
    pub async fn begin_step(
        &mut self,
        step: u64,
        stage: &mut Stage<'_>,
    ) -> Result<(), ScriptError> {
        for cue in self.due(step, |act| act == Act::Attach) {
            stage.cluster.attach(cue.engine, Place::Spare).await?;
            let text = format!("{} starts and attaches", cue.engine);
            self.tell(stage.view, (step, cue.engine, HappeningKind::Note), text);
            self.open(cue);
        }
        Ok(())
    }

    /// Carries out the kills and drains of `step`; called when its first samples have come.
    pub async fn amid_step(&mut self, step: u64, stage: &mut Stage<'_>) -> Result<(), ScriptError> {
        for cue in self.due(step, |act| act != Act::Attach) {
            // People may drain and kill engines, too.
            if stage.watcher.with(|story| story.is_gone(cue.engine)) {
                let text = format!("{} is gone already", cue.engine);
                self.tell(stage.view, (step, cue.engine, HappeningKind::Note), text);
                stage.cluster.bury(cue.engine).await?;
                continue;
            }
            let running = busy(stage.watcher, cue.engine).await?;
            self.open(cue);
            let (kind, text) = carry_out(cue, running, stage).await?;
            self.tell(stage.view, (step, cue.engine, kind), text);
        }
        Ok(())
    }

    /// Tells the outcome of earlier acts, and ends the remaining processes of engines that have left.
    pub async fn settle(&mut self, step: u64, stage: &mut Stage<'_>) -> Result<(), ScriptError> {
        for open in std::mem::take(&mut self.open) {
            match stage.watcher.with(|story| outcome(story, &open)) {
                Some(text) => {
                    let kind = match open.cue.act {
                        Act::Attach => HappeningKind::Joined,
                        Act::Kill | Act::Drain => {
                            stage.cluster.bury(open.cue.engine).await?;
                            HappeningKind::Note
                        }
                    };
                    self.tell(stage.view, (step, open.cue.engine, kind), text);
                }
                None => {
                    if open.cue.act == Act::Attach {
                        stage.cluster.check_node(open.cue.engine)?;
                    }
                    self.open.push(open);
                }
            }
        }
        Ok(())
    }

    fn due(&mut self, step: u64, which: impl Fn(Act) -> bool) -> Vec<Cue> {
        let due = |cue: &Cue| cue.step <= step && which(cue.act);
        let now = self.cues.iter().copied().filter(due).collect();
        self.cues.retain(|cue| !due(cue));
        now
    }

    fn open(&mut self, cue: Cue) {
        let since_s = self.started.elapsed().as_secs_f64();
        self.open.push(Open { cue, since_s });
    }

    fn tell(&mut self, view: &View, about: (u64, &str, HappeningKind), text: String) {
        let (step, engine, kind) = about;
        let at_s = self.started.elapsed().as_secs_f64();
        view.say(&format!("step {step}: {text}"));
        self.told.push(Happening { at_s, kind, engine: Some(engine.to_owned()), text });
    }
}

/// Waits until enough samples run on `engine` and have some tokens; returns how many run.
async fn busy(watcher: &Watcher, engine: &str) -> Result<u64, WatchError> {
    let given_up = Instant::now() + NOTICE;
    loop {
        let state = watcher.state().await?;
        let here = state.engines.iter().filter(|e| e.id == engine);
        let running = here.map(|e| e.running as u64).sum();
        if running >= WORTH_IT || Instant::now() > given_up {
            tokio::time::sleep(SOME_TOKENS).await;
            return Ok(running);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn carry_out(
    cue: Cue,
    running: u64,
    stage: &mut Stage<'_>,
) -> Result<(HappeningKind, String), ScriptError> {
    if cue.act == Act::Kill {
        stage.cluster.kill_engine(cue.engine).await?;
        let text =
            format!("{} is killed with SIGKILL while {running} samples run there", cue.engine);
        return Ok((HappeningKind::Killed, text));
    }
    match stage.watcher.drain_engine(cue.engine, DRAIN).await {
        Ok(said) => Ok((HappeningKind::Drained, said)),
        Err(WatchError::Refused { why, .. }) => {
            Ok((HappeningKind::Note, format!("{} is not drained: {why}", cue.engine)))
        }
        Err(other) => Err(other.into()),
    }
}

/// The outcome of an act in words; `None` while it is open.
fn outcome(story: &Story, open: &Open) -> Option<String> {
    let id = open.cue.engine;
    match open.cue.act {
        Act::Attach => {
            let engine = story.engines.get(id)?;
            let serving = |(at_s, phase): &(f64, Phase)| match phase {
                Phase::Serving { version } => Some((*at_s, *version)),
                _ => None,
            };
            let (at_s, version) = engine.phases.iter().find_map(serving)?;
            let took = at_s - open.since_s;
            Some(format!("{id} serves v{version}, {took:.1} s after its start"))
        }
        Act::Kill | Act::Drain => {
            let (left_s, why) = story.engines.get(id)?.left.clone()?;
            let took = left_s - open.since_s;
            let moved = match story.moved_off(id, open.since_s) {
                (0, _) => "every sample finished there".to_owned(),
                (n, kept) => format!("{n} samples went on elsewhere with {kept} tokens kept"),
            };
            let done = if open.cue.act == Act::Kill { "killed" } else { "drained" };
            Some(format!("{id} {done}: {moved} (gone after {took:.2} s: {why})"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::{EngineStory, Move};

    fn open(act: Act) -> Open {
        Open { cue: Cue { step: 5, engine: "engine-1", act }, since_s: 10.0 }
    }

    fn story(engine: EngineStory, moves: &[(f64, u64, u64)]) -> Story {
        let moved = |(at_s, samples, kept_tokens): &(f64, u64, u64)| Move {
            at_s: *at_s,
            from: "engine-1".into(),
            samples: *samples,
            kept_tokens: *kept_tokens,
            why: "engine lost".into(),
        };
        Story {
            engines: [("engine-1".to_owned(), engine)].into(),
            moves: moves.iter().map(moved).collect(),
            ..Story::default()
        }
    }

    #[test]
    fn a_kill_is_told_with_what_went_on_elsewhere_since_then() {
        let alive = EngineStory::default();
        assert_eq!(outcome(&story(alive.clone(), &[]), &open(Act::Kill)), None);
        let dead = EngineStory { left: Some((10.2, "no answer".into())), ..alive };
        let moves = [(9.0, 5, 50), (10.1, 20, 170), (10.2, 3, 11)];
        let text = outcome(&story(dead.clone(), &moves), &open(Act::Kill)).unwrap();
        assert!(text.contains("23 samples went on elsewhere with 181 tokens kept"), "{text}");
        let text = outcome(&story(dead, &[]), &open(Act::Drain)).unwrap();
        assert!(text.starts_with("engine-1 drained: every sample finished there"), "{text}");
    }

    #[test]
    fn an_attach_is_told_when_the_engine_first_serves() {
        let joining = EngineStory { phases: vec![(10.3, Phase::Joining)], ..Default::default() };
        assert_eq!(outcome(&story(joining.clone(), &[]), &open(Act::Attach)), None);
        let mut serving = joining;
        serving.phases.push((10.5, Phase::Serving { version: 2 }));
        serving.phases.push((11.5, Phase::Serving { version: 3 }));
        let text = outcome(&story(serving, &[]), &open(Act::Attach)).unwrap();
        assert_eq!(text, "engine-1 serves v2, 0.5 s after its start");
    }
}
