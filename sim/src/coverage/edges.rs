//! The edges of the manager's state graphs that these worlds have taken. `-` is the state before the first and
//! after the last one. An event may take several edges at once; then the table has the first and the last state.

/// Machine, state, and the states that one event may lead to from there.
pub(super) const EDGES: &[(&str, &str, &[&str])] = &[
    ("engine", "-", &["joining", "serving", "syncing"]),
    ("engine", "draining", &["gone"]),
    ("engine", "joining", &["draining", "gone", "serving", "suspect"]),
    ("engine", "quarantined", &["gone"]),
    ("engine", "released", &["suspect", "syncing"]),
    ("engine", "releasing", &["gone", "released", "suspect"]),
    ("engine", "serving", &["draining", "gone", "releasing", "suspect", "syncing", "updating"]),
    (
        "engine",
        "suspect",
        &["draining", "gone", "quarantined", "released", "releasing", "serving", "syncing"],
    ),
    ("engine", "syncing", &["draining", "gone", "releasing", "serving", "suspect"]),
    ("engine", "updating", &["draining", "gone", "serving", "suspect", "syncing"]),
    ("sample", "-", &["waiting", "running"]),
    ("sample", "waiting", &["abandoned", "delivered", "finished", "running"]),
    ("sample", "running", &["abandoned", "delivered", "finished", "waiting"]),
    ("sample", "finished", &["delivered"]),
    ("sample", "delivered", &["-"]),
    ("sample", "abandoned", &["-"]),
    ("version", "-", &["announced"]),
    ("version", "announced", &["available", "current"]),
    ("version", "available", &["current", "superseded"]),
    ("version", "current", &["-", "superseded"]),
    ("version", "retired", &["-"]),
    ("version", "superseded", &["-", "retired"]),
];
