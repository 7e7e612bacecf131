//! Books: the durable state of the fleet. Only [`Books::apply`] writes them.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{EngineId, Incarnation, SessionId, Version};

use super::state::EngineState;

/// Sessions, the newest incarnation of every engine, and the mode the trainer asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Books {
    sessions: BTreeMap<SessionId, SessionBook>,
    by_id: BTreeMap<EngineId, SessionId>,
    incarnations: BTreeMap<EngineId, Incarnation>,
    /// Engines whose machine was taken away once, with notice: that may happen again.
    noticed: BTreeSet<EngineId>,
    /// The trainer has its own GPUs for training.
    training: bool,
}

/// One session of an engine: from its attachment to its end, over all its links.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SessionBook {
    engine: EngineId,
    state: EngineState,
    /// Version in the engine's memory, as the agent or the trainer said.
    loaded: Version,
    /// Version that the trainer said it has loaded there.
    attested: Option<Version>,
    /// The engine's memory was asked for and is not given back yet.
    parked: bool,
}

/// One durable fact of the fleet, in plain ids and numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    Attached {
        session: SessionId,
        engine: EngineId,
        incarnation: Incarnation,
        loaded: Version,
    },
    /// A session moved along the edges of its graph.
    Moved {
        session: SessionId,
        to: EngineState,
    },
    Loaded {
        session: SessionId,
        version: Version,
    },
    Attested {
        session: SessionId,
        version: Option<Version>,
    },
    Parked {
        session: SessionId,
        parked: bool,
    },
    Noticed {
        engine: EngineId,
    },
    Training {
        training: bool,
    },
    Forgotten {
        session: SessionId,
    },
}

impl Books {
    /// Folds one change. False where a session made a move that its graph does not have.
    pub fn apply(&mut self, change: &Change) -> bool {
        match change {
            Change::Attached { session, engine, incarnation, loaded } => {
                let state = EngineState::Joining;
                let engine = engine.clone();
                self.by_id.insert(engine.clone(), *session);
                self.incarnations.insert(engine.clone(), *incarnation);
                let loaded = *loaded;
                let book = SessionBook { engine, state, loaded, attested: None, parked: false };
                self.sessions.insert(*session, book);
            }
            Change::Moved { session, to } => {
                let Some(book) = self.sessions.get_mut(session) else { return true };
                let legal = book.state.may_become(to);
                book.state = to.clone();
                return legal;
            }
            Change::Loaded { session, version } => self.write(*session, |b| b.loaded = *version),
            Change::Attested { session, version } => {
                self.write(*session, |book| book.attested = *version);
            }
            Change::Parked { session, parked } => self.write(*session, |b| b.parked = *parked),
            Change::Noticed { engine } => {
                self.noticed.insert(engine.clone());
            }
            Change::Training { training } => self.training = *training,
            Change::Forgotten { session } => self.forget(*session),
        }
        true
    }

    fn write(&mut self, session: SessionId, write: impl FnOnce(&mut SessionBook)) {
        if let Some(book) = self.sessions.get_mut(&session) {
            write(book);
        }
    }

    fn forget(&mut self, session: SessionId) {
        if let Some(book) = self.sessions.remove(&session)
            && self.by_id.get(&book.engine) == Some(&session)
        {
            self.by_id.remove(&book.engine);
        }
    }

    pub fn session(&self, session: SessionId) -> Option<&SessionBook> {
        self.sessions.get(&session)
    }

    /// Newest session of an engine, also when it is over.
    pub fn by_id(&self, engine: &EngineId) -> Option<SessionId> {
        self.by_id.get(engine).copied()
    }

    pub fn incarnation(&self, engine: &EngineId) -> Option<Incarnation> {
        self.incarnations.get(engine).copied()
    }

    pub fn is_noticed(&self, engine: &EngineId) -> bool {
        self.noticed.contains(engine)
    }

    pub fn training(&self) -> bool {
        self.training
    }
}

impl SessionBook {
    pub fn state(&self) -> &EngineState {
        &self.state
    }

    pub fn loaded(&self) -> Version {
        self.loaded
    }

    pub fn attested(&self) -> Option<Version> {
        self.attested
    }

    pub fn parked(&self) -> bool {
        self.parked
    }
}
