//! Events outside the manager: of agents ([`super::agents`]) and of the trainer ([`super::training`]).

use std::time::Duration;

use super::{Happening, World};

impl World {
    pub(super) fn happen_outside(&mut self, happening: Happening) {
        match happening {
            Happening::Make { engine } => self.make(engine),
            Happening::Redial { engine } => self.dial(engine),
            Happening::Reborn { engine } => self.reborn(engine),
            Happening::Preempted { engine } => self.preempted(engine),
            Happening::NetUp { engine } => {
                self.engines[engine].net_up = true;
                self.resend(engine);
                if self.engines[engine].link.is_none_or(|link| !self.links.contains_key(&link)) {
                    self.redial(engine, Duration::from_millis(30));
                }
            }
            Happening::Recover { engine } => self.engines[engine].slow = 1,
            Happening::LoadStep { engine, incarnation, order } => {
                self.load_step(engine, incarnation, order)
            }
            Happening::DrainOver { engine, incarnation, order } => {
                self.drain_over(engine, incarnation, order);
            }
            Happening::Beats => self.beats(),
            Happening::Sweep => self.sweep(),
            Happening::OpenJob => self.open_job(),
            Happening::Submit { step } => self.submit_again(step),
            Happening::Close => self.close(),
            Happening::Publish => self.publish(None),
            Happening::Trained { step } => self.trained(step),
            Happening::Republish => self.republish(),
            Happening::Consume { shard } => self.consume(shard),
            Happening::Take { consumer, batch, samples } => self.take(consumer, &batch, &samples),
            Happening::Done { consumer, report }
                if self.trainer.consumers.contains_key(&consumer) =>
            {
                self.trainer.step_done(&report);
                self.advance();
            }
            Happening::Answer { to, answer } => self.answered(to, answer),
            _ => {}
        }
    }
}
