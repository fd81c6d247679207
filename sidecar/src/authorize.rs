//! Whether a request or a connection is allowed: a plain decision over what was proved, made again when
//! the rules change.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use weft_certs::VerifiedPeer;
use weft_model::{
    RbacDecision, RbacEvaluation, RbacFilter, RequestFacts, SpiffeId, evaluate_rbac,
    evaluate_rbac_readings,
};

use crate::authenticate::{Authenticated, ClientInfo, HttpRequestFacts, VerifiedTokens};
use crate::denial::Denial;
use crate::http::head::RequestHead;
use crate::http::headers::Headers;

/// The rules of a chain, in the order in which they are asked.
pub(crate) type RbacFilters = [Arc<RbacFilter>];

/// A request that every policy allowed. Made only by [`authorize`].
#[derive(Debug)]
pub(crate) struct Authorized<'a>(Authenticated<'a>);

impl Authorized<'_> {
    pub(crate) fn facts(&self) -> HttpRequestFacts<'_> {
        self.0.facts()
    }

    /// When the stream stream_deadline, where its token says so.
    pub(crate) fn stream_deadline(&self) -> Option<SystemTime> {
        self.0.stream_deadline()
    }

    /// What the decision rested on beside the head.
    pub(crate) fn into_inputs(self) -> AuthorizationInputs {
        AuthorizationInputs {
            client_address: self.facts().client_address(),
            tokens: self.0.into_tokens(),
            target: None,
            authority: None,
            headers: None,
        }
    }
}

/// Allows a request that each of `rules` allows, and says what decided.
pub(crate) fn authorize<'a, 'p>(
    request: Authenticated<'a>,
    rules: &'p RbacFilters,
) -> (RbacEvaluation<'p>, Result<Authorized<'a>, Denial>) {
    let judgement = evaluate_rbac_readings(&rules.iter().map(|f| &**f), request.facts().readings());
    let refused = judgement.enforced.refused;
    (judgement, if refused { Err(Denial::NotAllowed) } else { Ok(Authorized(request)) })
}

/// What a request was allowed by, as far as its head does not say so any more, for as long as it lasts.
#[derive(Debug)]
pub(crate) struct AuthorizationInputs {
    /// The client, as trusted hops forwarded it.
    pub(crate) client_address: IpAddr,
    pub(crate) tokens: VerifiedTokens,
    /// The target that was decided upon, where another is sent on.
    pub(crate) target: Option<String>,
    /// The same of the authority.
    pub(crate) authority: Option<String>,
    /// The same of the headers.
    pub(crate) headers: Option<Box<Headers>>,
}

impl AuthorizationInputs {
    /// What is known of the request, as it was when it was decided upon.
    pub(crate) fn facts<'f>(
        &'f self,
        head: &'f RequestHead,
        client: ClientInfo<'f>,
    ) -> HttpRequestFacts<'f> {
        HttpRequestFacts {
            head,
            target: self.target.as_deref().unwrap_or(&head.target),
            authority: self.authority.as_deref().unwrap_or(&head.authority),
            headers: self.headers.as_deref().unwrap_or(&head.headers),
            client,
            proved: Some(&self.tokens),
            reading: 0,
        }
    }
}

/// What other rules say.
pub(crate) fn judge_again<'p>(
    facts: &HttpRequestFacts<'_>,
    rules: &'p RbacFilters,
) -> RbacDecision<'p> {
    evaluate_rbac_readings(&rules.iter().map(|filter| &**filter), facts.readings()).enforced
}

/// What is known of a connection whose bytes are not read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionFacts<'a> {
    pub(crate) peer: Option<&'a VerifiedPeer>,
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
}

impl ConnectionFacts<'_> {
    /// Whether the rules let the connection in.
    pub(crate) fn is_let_in(&self, rules: &RbacFilters) -> bool {
        !evaluate_rbac(rules.iter().map(|filter| &**filter), self).enforced.refused
    }
}

/// A rule that asks for something of a request finds nothing.
impl RequestFacts for ConnectionFacts<'_> {
    fn method(&self) -> &str {
        ""
    }

    fn path(&self) -> &str {
        ""
    }

    fn target_fits(&self, _: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        false
    }

    fn scheme(&self) -> &str {
        ""
    }

    fn authority(&self) -> &str {
        ""
    }

    fn has_header(&self, _: &str, _: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        false
    }

    fn query(&self, _: &str) -> Option<&str> {
        None
    }

    fn has_claim(&self, _: &str, _: &[String], _: &mut dyn FnMut(&str) -> bool) -> bool {
        false
    }

    fn peer(&self) -> Option<&SpiffeId> {
        self.peer.and_then(VerifiedPeer::identity)
    }

    fn remote_address(&self) -> IpAddr {
        self.client.ip().to_canonical()
    }

    fn client_address(&self) -> IpAddr {
        self.remote_address()
    }

    fn destination_address(&self) -> IpAddr {
        self.destination.ip().to_canonical()
    }

    fn destination_port(&self) -> u16 {
        self.destination.port()
    }
}
