//! Placeholder; see ARCHITECTURE.
