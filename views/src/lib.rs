//! What people and scripts read of a manager: its state (`GET /state`) and its notices (`GET /events`).
//!
//! Owns the JSON: its fields, the names of an engine's states, pages. Decides nothing, does no I/O, and knows
//! none of the manager's own types: the manager fills these ones in `manager/src/view`. The crate is a leaf, so
//! that a field for a dashboard rebuilds neither the transfer engine nor the agent.
//!
//! Rules of all types here:
//! - Each type is both written and read, so writer and readers cannot drift apart.
//! - Reading a state passes over unknown fields, fills missing ones with defaults, and accepts unknown words
//!   ([`Lenient`], [`EngineState::Unknown`]): a viewer works with an older and with a newer manager.
//! - Times are milliseconds, sizes are bytes. No prompt and no token stands in a view.
#![warn(missing_docs)]

mod engine;
mod lenient;
mod notice;
mod page;
mod state;
mod version;
mod work;

pub use engine::{EngineState, EngineView, FleetView, LoadView};
pub use lenient::Lenient;
pub use notice::Notice;
pub use page::{BadPage, MAX_PAGE, StatePage};
pub use state::{LedgerView, StateAnswer, StateView};
pub use version::{ProgressView, VersionView};
pub use work::{Counters, EgressView, JobView, QueueView, SamplesView, StepView};
