//! One file per subcommand: arguments in, one call of the crate that does the work, an exit status out.

// processes
pub mod agent;
pub mod engine;
pub mod manager;
pub mod relay;
// a job from a shell
pub mod publish;
pub mod submit;
// looking and steering
pub mod engines;
pub mod rollout;
pub mod watch;
// runs of their own
pub mod bench;
pub mod demo;
pub mod sim;
