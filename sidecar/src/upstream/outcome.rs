//! How an exchange with an endpoint ended, for its access line.

use crate::http::body::Broken;
use crate::patience::Pulse;

/// How an exchange ended that began.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outcome {
    pub(crate) status: u16,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    /// Which side broke it off, if one did.
    pub(crate) broken: Option<&'static str>,
    /// Why it was broken off, as far as that is known.
    pub(crate) detail: Option<&'static str>,
}

impl Outcome {
    /// Takes down how the response's body ended.
    pub(super) fn downloaded(&mut self, result: Result<u64, Broken>, pulse: &Pulse) {
        match result {
            Ok(bytes) => self.bytes_received = bytes,
            Err(broken) => {
                // What passed before.
                self.bytes_received = pulse.bytes_received();
                self.broken = Some(match broken {
                    Broken::Source | Broken::Ended(_) | Broken::Malformed(_) => {
                        "endpoint_broke_off"
                    }
                    Broken::Sink => "client_broke_off",
                });
                self.detail = match broken {
                    Broken::Ended(why) | Broken::Malformed(why) => Some(why),
                    Broken::Source => Some("the connection was lost"),
                    Broken::Sink => None,
                };
            }
        }
    }
}
