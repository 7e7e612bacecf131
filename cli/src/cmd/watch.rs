//! `anabranch watch`: the whole state on one screen, until q. Plain lines if stdout is no terminal.

mod draw;
mod model;

use std::io::IsTerminal;
use std::time::Duration;

use anabranch_proto::pb;
use anabranch_runtime::Exit;
use anabranch_runtime::signal::shutdown_signal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::failure::{Failure, OrExit, Outcome};
use crate::link::{Admin, ManagerArgs};
use model::Model;

const LOOK_EVERY: Duration = Duration::from_millis(500);
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Flags of `anabranch watch`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    manager: ManagerArgs,
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    let admin = args.manager.admin().await?;
    let model = Model::new(&args.manager.manager);
    if std::io::stdout().is_terminal() {
        on_terminal(admin, model).await
    } else {
        as_lines(admin, model).await
    }
}

async fn as_lines(mut admin: Admin, mut model: Model) -> Outcome {
    let mut events = admin.events().await?;
    let mut looks = tokio::time::interval(LINE_EVERY);
    let mut stop = std::pin::pin!(shutdown_signal());
    loop {
        tokio::select! {
            _ = looks.tick() => {
                model.look(admin.state().await?);
                println!("{}", model.line());
            }
            event = events.message() => match event? {
                Some(event) => {
                    if let Some(line) = model.event(&event.text) {
                        println!("{line}");
                    }
                }
                None => return Err(Failure::new(Exit::Unavailable, "the manager ended the stream of events")),
            },
            _ = &mut stop => return Ok(Exit::Ok),
        }
    }
}

async fn on_terminal(mut admin: Admin, mut model: Model) -> Outcome {
    let mut events = admin.events().await?;
    let mut keys = keys().or_exit(Exit::Io)?;
    let mut looks = tokio::time::interval(LOOK_EVERY);
    let mut stop = std::pin::pin!(shutdown_signal());
    let mut terminal = ratatui::try_init().or_exit(Exit::Io)?;
    let ended = loop {
        if let Err(error) = terminal.draw(|frame| draw::draw(frame, &model)) {
            break Err(Failure::new(Exit::Io, format!("cannot draw: {error}")));
        }
        tokio::select! {
            _ = looks.tick() => match admin.state().await {
                Ok(state) => model.look(state),
                Err(failure) => model.lost(&failure.text),
            },
            text = next_event(&mut events) => match text {
                Ok(text) => { model.event(&text); }
                Err(why) => {
                    model.lost(&why);
                    tokio::time::sleep(LOOK_EVERY).await;
                    if let Ok(again) = admin.events().await {
                        events = again;
                    }
                }
            },
            _ = &mut stop => break Ok(Exit::Ok),
            key = keys.recv() => match key {
                Some(Key::Quit) | None => break Ok(Exit::Ok),
                Some(Key::Redraw) => {}
            },
        }
    };
    ratatui::restore();
    ended
}

async fn next_event(events: &mut Streaming<pb::Json>) -> Result<String, String> {
    match events.message().await {
        Ok(Some(event)) => Ok(event.text),
        Ok(None) => Err("the manager ended the stream of events".into()),
        Err(status) => Err(status.message().to_owned()),
    }
}

enum Key {
    Quit,
    Redraw,
}

/// Reads the terminal on a thread, because that blocks; the thread ends with the process or when nobody listens.
fn keys() -> std::io::Result<mpsc::Receiver<Key>> {
    let (sender, keys) = mpsc::channel(8);
    let read = move || {
        while let Ok(event) = event::read() {
            let key = match event {
                Event::Key(key) if is_quit(key.code, key.modifiers) => Key::Quit,
                Event::Resize(..) => Key::Redraw,
                _ => continue,
            };
            if sender.blocking_send(key).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("keys".into()).spawn(read)?;
    Ok(keys)
}

fn is_quit(code: KeyCode, modifiers: KeyModifiers) -> bool {
    match code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        KeyCode::Char('c') => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}
