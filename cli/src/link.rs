//! Access to a manager from the command line: the flags, and the two kinds of client.

use anabranch_proto::limits::MAX_SUBMIT_BYTES;
use anabranch_proto::pb::{self, admin_client::AdminClient};
use anabranch_runtime::{Endpoint, JoinToken, connect_to};
use anabranch_trainer::Client;
use anabranch_views::StateView;
use serde::de::DeserializeOwned;
use tonic::transport::Channel;
use tonic::{Request, Streaming};

use crate::failure::{Failure, OrExit};
use anabranch_runtime::Exit;

/// Flags that say which manager, and with which token.
#[derive(Clone, Debug, clap::Args)]
pub struct ManagerArgs {
    /// http://HOST:PORT, https://HOST:PORT (needs a token), or file:PATH, what its --announce wrote
    #[arg(long, env = "ANABRANCH_MANAGER", default_value = "http://127.0.0.1:5000")]
    pub manager: String,
    /// Join token (ab1....); not needed on loopback
    #[arg(long, env = "ANABRANCH_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
}

/// Client for people and scripts: reads state and events, sends engines away.
pub struct Admin {
    rpc: AdminClient<Channel>,
    token: Option<JoinToken>,
}

/// A page of the state, reduced to the engines.
#[derive(serde::Deserialize)]
struct RawPage {
    engines: Vec<serde_json::Value>,
    #[serde(default)]
    next: Option<u64>,
}

// === impl ManagerArgs ===

impl ManagerArgs {
    /// Connects as a trainer.
    pub async fn trainer(&self) -> Result<Client, Failure> {
        Ok(Client::connect(&self.manager, self.token.as_deref()).await?)
    }

    /// Connects as a person or script.
    pub async fn admin(&self) -> Result<Admin, Failure> {
        let endpoint = Endpoint::parse(&self.manager).or_exit(Exit::Usage)?;
        let token = self.token.as_deref().map(JoinToken::parse).transpose().or_exit(Exit::Usage)?;
        let channel = connect_to(&endpoint, token.as_ref()).await?;
        let announced = endpoint.resolve().ok().and_then(|(_, token)| token);
        let rpc = AdminClient::new(channel).max_decoding_message_size(MAX_SUBMIT_BYTES);
        Ok(Admin { rpc, token: token.or(announced) })
    }
}

// === impl Admin ===

impl Admin {
    /// The manager's whole state, read page by page.
    pub async fn state(&mut self) -> Result<StateView, Failure> {
        let mut all: StateView = self.page(0).await?;
        while let Some(from) = all.next {
            all.extend(self.page(from).await?);
            check_order(from, all.next)?;
        }
        Ok(all)
    }

    /// All engines as the manager writes them, for scripts: with fields that this version does not know.
    pub async fn engines_json(&mut self) -> Result<Vec<serde_json::Value>, Failure> {
        let mut all = Vec::new();
        let mut next = Some(0);
        while let Some(from) = next {
            let page: RawPage = self.page(from).await?;
            all.extend(page.engines);
            check_order(from, page.next)?;
            next = page.next;
        }
        Ok(all)
    }

    /// Reads the page of the state that begins with session `from`.
    async fn page<T: DeserializeOwned>(&mut self, from: u64) -> Result<T, Failure> {
        let request = pb::StateRequest { token: self.token_text(), from, limit: 0 };
        let request = self.request(request);
        let text = self.rpc.state(request).await?.into_inner().text;
        serde_json::from_str(&text).map_err(|error| {
            let text =
                format!("the manager's state cannot be read ({error}); is it the same version?");
            Failure::new(Exit::Protocol, text)
        })
    }

    /// The stream of events, each a JSON object.
    pub async fn events(&mut self) -> Result<Streaming<pb::Json>, Failure> {
        let request = pb::StateRequest { token: self.token_text(), ..Default::default() };
        let request = self.request(request);
        Ok(self.rpc.events(request).await?.into_inner())
    }

    /// Drains or removes an engine; returns the manager's answer in words.
    pub async fn engines(&mut self, request: pb::EnginesRequest) -> Result<String, Failure> {
        let request = self.request(request);
        Ok(self.rpc.engines(request).await?.into_inner().text)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            let mut value = tonic::metadata::MetadataValue::try_from(format!("Bearer {token}"))
                .expect("a parsed token is printable ASCII");
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        request
    }

    fn token_text(&self) -> String {
        self.token.as_ref().map(JoinToken::to_string).unwrap_or_default()
    }
}

/// Fails if the pages do not come to an end.
fn check_order(from: u64, next: Option<u64>) -> Result<(), Failure> {
    match next {
        Some(next) if next <= from => {
            let text = format!("the manager's page from session {from} is followed by {next}");
            Err(Failure::new(Exit::Protocol, text))
        }
        _ => Ok(()),
    }
}
