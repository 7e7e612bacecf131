//! Endings of a sample.

use serde::{Deserialize, Serialize};

use crate::invalid::Invalid;
use crate::pb;

/// How a sample ended, as its trajectory says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "how", content = "detail")]
pub enum Finish {
    /// At an EOS or stop id (empty text), or at the stop string that matched.
    Stop(String),
    /// At `max_tokens`.
    Length,
    /// On the trainer's request, with the tokens it had.
    Cancelled,
    /// Given up by the manager; the text tells why.
    Abandoned(String),
}

// === impl Finish ===

impl Finish {
    /// One word, for logs and files: `stop`, `length`, `cancelled` or `abandoned`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Stop(_) => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Abandoned(_) => "abandoned",
        }
    }

    /// The stop string that matched, or the story of an abandoned sample; else empty.
    pub fn detail(&self) -> &str {
        match self {
            Self::Stop(detail) | Self::Abandoned(detail) => detail,
            Self::Length | Self::Cancelled => "",
        }
    }

    /// Code of the wire, which [`Finish::detail`] goes with.
    pub const fn code(&self) -> pb::trajectory::Finish {
        use pb::trajectory::Finish as Code;
        match self {
            Self::Stop(_) => Code::Stop,
            Self::Length => Code::Length,
            Self::Cancelled => Code::Cancelled,
            Self::Abandoned(_) => Code::Abandoned,
        }
    }

    /// Reads code and detail of a trajectory.
    pub fn from_wire(code: i32, detail: String) -> Result<Self, Invalid> {
        use pb::trajectory::Finish as Code;
        match Code::try_from(code) {
            Ok(Code::Stop) => Ok(Self::Stop(detail)),
            Ok(Code::Length) => Ok(Self::Length),
            Ok(Code::Cancelled) => Ok(Self::Cancelled),
            Ok(Code::Abandoned) => Ok(Self::Abandoned(detail)),
            Ok(Code::Unspecified) | Err(_) => {
                let known = ["stop", "length", "cancelled", "abandoned"];
                Err(Invalid::unknown("finish", code, &known))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ending_goes_over_the_wire_and_back() {
        let ends = [
            Finish::Stop("x".into()),
            Finish::Length,
            Finish::Cancelled,
            Finish::Abandoned("y".into()),
        ];
        for end in ends {
            let read = Finish::from_wire(end.code().into(), end.detail().to_owned());
            assert_eq!(read, Ok(end));
        }
        let error = Finish::from_wire(0, String::new()).expect_err("unspecified").to_string();
        assert_eq!(error, "finish: 0 is unknown: stop, length, cancelled or abandoned");
    }

    #[test]
    fn its_json_is_that_of_the_state_page() {
        let json = |end: &Finish| serde_json::to_string(end).expect("plain data");
        assert_eq!(json(&Finish::Stop("E".into())), r#"{"how":"stop","detail":"E"}"#);
        assert_eq!(json(&Finish::Length), r#"{"how":"length"}"#);
        let read: Finish =
            serde_json::from_str(r#"{"how":"abandoned","detail":"poison"}"#).expect("read");
        assert_eq!((read.name(), read.detail()), ("abandoned", "poison"));
    }
}
