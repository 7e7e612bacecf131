//! Child processes that cannot outlive this process: each child leads a process group of its own,
//! the group ends with its leader, and the kernel kills the leader when this process dies. The
//! caller decides what to start.
#![allow(unsafe_code)] // `pre_exec` is the only way to ask for the parent-death signal.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, getpid, getppid, kill_process_group, set_parent_process_death_signal};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::drain::Drain;

pub use rustix::process::Signal;

/// Longest line of a child's output that is logged in one piece.
const MAX_LINE_BYTES: u64 = 16 << 10;

/// Destination of a child's stdout and stderr. The stdin of a child is always empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Output {
    /// This process's log, line by line, target `child`.
    #[default]
    Log,
    /// The stdout and stderr of this process.
    Inherit,
    /// Nowhere.
    Null,
    /// The end of this file.
    File(PathBuf),
}

/// Reason why a child process was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The program does not exist.
    #[error("cannot start {name}: there is no program {program:?}; check its path or PATH")]
    NotFound {
        /// Name of the child in logs.
        name: String,
        /// Program as given.
        program: String,
    },
    /// The operating system refused to start the program.
    #[error("cannot start {name} ({program:?}): {source}")]
    Spawn {
        /// Name of the child in logs.
        name: String,
        /// Program as given.
        program: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The file for the output cannot be opened.
    #[error("cannot write the output of {name} to {}: {source}", path.display())]
    Output {
        /// Name of the child in logs.
        name: String,
        /// File for the output.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
}

/// A started process and its process group. Dropping the handle kills the group.
#[derive(Debug)]
pub struct Child {
    name: String,
    group: Pid,
    inner: tokio::process::Child,
    ended: Option<ExitStatus>,
}

impl Child {
    /// Starts `command`; logs call the child `name`. `drain` runs the tasks that read the child's
    /// output, which end with the child.
    pub async fn start(
        name: &str,
        mut command: Command,
        output: Output,
        drain: &Drain,
    ) -> Result<Child, StartError> {
        let program = command.get_program().to_string_lossy().into_owned();
        direct(&mut command, name, &output)?;
        let mut inner = spawn_on_lasting_thread(contained(command)).await.map_err(|source| {
            let (name, program) = (name.to_owned(), program);
            match source.kind() {
                io::ErrorKind::NotFound => StartError::NotFound { name, program },
                _ => StartError::Spawn { name, program, source },
            }
        })?;
        let pid = inner.id().expect("a child that was not waited for has an id");
        let group = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("ids are positive");
        if let Some(stdout) = inner.stdout.take() {
            drain.spawn("child stdout", log_lines(stdout, name.to_owned(), "stdout"));
        }
        if let Some(stderr) = inner.stderr.take() {
            drain.spawn("child stderr", log_lines(stderr, name.to_owned(), "stderr"));
        }
        tracing::debug!(child = name, pid, "started");
        Ok(Child { name: name.to_owned(), group, inner, ended: None })
    }

    /// Name of the child in logs.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process id of the leader, which is also the id of the group.
    pub fn id(&self) -> u32 {
        self.group.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for the leader to end, then kills what is left of the group. May be called again, and
    /// dropped at any point.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let status = self.inner.wait().await?;
        Ok(self.reaped(status))
    }

    /// The exit status of the leader; `None` while the leader runs.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none()
            && let Some(status) = self.inner.try_wait()?
        {
            self.reaped(status);
        }
        Ok(self.ended)
    }

    /// Sends `signal` to every process of the group. False if the leader has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<bool> {
        if self.ended.is_some() {
            return Ok(false);
        }
        kill_process_group(self.group, signal)?;
        Ok(true)
    }

    /// Ends the group: SIGTERM, and after `deadline` SIGKILL to what is left.
    pub async fn terminate(&mut self, deadline: Duration) -> io::Result<ExitStatus> {
        if self.signal(Signal::TERM)? {
            // A stopped process acts on SIGTERM only once it goes on.
            self.signal(Signal::CONT)?;
        }
        match tokio::time::timeout(deadline, self.wait()).await {
            Ok(status) => status,
            Err(_) => {
                tracing::warn!(child = self.name, ?deadline, "did not end on SIGTERM; killing it");
                self.kill().await
            }
        }
    }

    /// Kills the group at once, with SIGKILL.
    pub async fn kill(&mut self) -> io::Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait().await
    }

    /// Kills the rest of the group and notes the status. The kernel may give the id of an empty
    /// group to others, so this is the last use of the id: right after the leader was reaped,
    /// before ids can have wrapped around.
    fn reaped(&mut self, status: ExitStatus) -> ExitStatus {
        // An error means that nobody is left.
        let _ = kill_process_group(self.group, Signal::KILL);
        self.ended = Some(status);
        status
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Err(error) = self.signal(Signal::KILL) {
            tracing::debug!(child = self.name, %error, "its group was gone already");
        }
    }
}

fn direct(command: &mut Command, name: &str, output: &Output) -> Result<(), StartError> {
    command.stdin(Stdio::null());
    match output {
        Output::Log => command.stdout(Stdio::piped()).stderr(Stdio::piped()),
        Output::Inherit => command.stdout(Stdio::inherit()).stderr(Stdio::inherit()),
        Output::Null => command.stdout(Stdio::null()).stderr(Stdio::null()),
        Output::File(path) => {
            let failed =
                |source| StartError::Output { name: name.to_owned(), path: path.clone(), source };
            let file = File::options().create(true).append(true).open(path).map_err(failed)?;
            let same = file.try_clone().map_err(failed)?;
            command.stdout(file).stderr(same)
        }
    };
    Ok(())
}

/// Puts the child into a process group of its own that is killed with this process.
fn contained(command: Command) -> tokio::process::Command {
    let mut command = tokio::process::Command::from(command);
    command.process_group(0).kill_on_drop(true);
    let parent = getpid();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. The closure makes two
    // system calls and builds its error from a number: no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // Where the parent died before the request, no signal will come.
            match getppid() {
                Some(now) if now == parent => Ok(()),
                _ => Err(rustix::io::Errno::SRCH.into()),
            }
        });
    }
    command
}

/// Spawns on a thread that never ends. "Parent" in the parent-death signal means the *thread* that
/// forked: a worker of a runtime that is shut down would take the children with it.
async fn spawn_on_lasting_thread(
    mut command: tokio::process::Command,
) -> io::Result<tokio::process::Child> {
    type Task = Box<dyn FnOnce() + Send>;
    static THREAD: OnceLock<mpsc::Sender<Task>> = OnceLock::new();
    let thread = THREAD.get_or_init(|| {
        // Unbounded, but each caller waits for its own task.
        let (tasks, queue) = mpsc::channel::<Task>();
        thread::Builder::new()
            .name("child-spawner".to_owned())
            .spawn(move || queue.into_iter().for_each(|task| task()))
            .expect("a thread can be started");
        tasks
    });
    let (reply, answer) = oneshot::channel();
    let runtime = Handle::current();
    let task = Box::new(move || {
        let _inside = runtime.enter();
        // A caller that left drops the child, which kills it.
        let _ = reply.send(command.spawn());
    });
    thread.send(task).expect("the spawner thread never ends");
    answer.await.expect("the spawner thread answers every task")
}

async fn log_lines(stream: impl AsyncRead + Unpin, child: String, from: &'static str) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stream).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                tracing::info!(target: "child", child, from, "{}", text.trim_end());
            }
            Err(error) => {
                return tracing::warn!(child, from, %error, "cannot read a child's output");
            }
        }
    }
}

#[cfg(test)]
mod tests;
