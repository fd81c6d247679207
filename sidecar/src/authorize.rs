//! Authorizes requests and connections: evaluates RBAC filters over verified facts, and again when the policies
//! change.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use weft_model::{RbacDecision, RbacEvaluation, RbacFilter, RequestFacts, evaluate_rbac_readings};

use crate::authenticate::Authenticated;
use crate::authenticate::verified::VerifiedTokens;
use crate::denial::Denial;
use crate::http::head::RequestHead;
use crate::http::headers::Headers;
use crate::request_facts::{ClientInfo, HttpRequestFacts};

/// The RBAC filters of a filter chain, in evaluation order.
pub(crate) type RbacFilters = [Arc<RbacFilter>];

/// A request that every policy allows. Only [`authorize`] makes one.
#[derive(Debug)]
pub(crate) struct Authorized<'a>(Authenticated<'a>);

impl Authorized<'_> {
    pub(crate) fn facts(&self) -> HttpRequestFacts<'_> {
        self.0.facts()
    }

    /// When the stream must end because its token expires.
    pub(crate) fn stream_deadline(&self) -> Option<SystemTime> {
        self.0.stream_deadline()
    }

    /// What the decision depended on apart from the head.
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

/// Evaluates `rules` for a request, and returns the decision together with the policy that made it.
pub(crate) fn authorize<'a, 'p>(
    request: Authenticated<'a>,
    rules: &'p RbacFilters,
) -> (RbacEvaluation<'p>, Result<Authorized<'a>, Denial>) {
    let judgement = evaluate_rbac_readings(&rules.iter().map(|f| &**f), request.facts().readings());
    let refused = judgement.enforced.refused;
    (judgement, if refused { Err(Denial::NotAllowed) } else { Ok(Authorized(request)) })
}

/// What a request was authorized with, kept as long as the request lasts, so that authorization can be repeated when
/// the policies change. Holds the original of each part of the head that was changed afterwards.
#[derive(Debug)]
pub(crate) struct AuthorizationInputs {
    /// The client address, after trusted hops.
    pub(crate) client_address: IpAddr,
    pub(crate) tokens: VerifiedTokens,
    /// The original target, where another one is sent upstream.
    pub(crate) target: Option<String>,
    /// The original authority, where another one is sent upstream.
    pub(crate) authority: Option<String>,
    /// The original headers, where others are sent upstream.
    pub(crate) headers: Option<Box<Headers>>,
}

impl AuthorizationInputs {
    /// The facts about the request as they were when it was authorized.
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
            tokens: Some(&self.tokens),
            reading: 0,
        }
    }
}

/// Evaluates other rules for a request that was authorized before.
pub(crate) fn judge_again<'p>(
    facts: &HttpRequestFacts<'_>,
    rules: &'p RbacFilters,
) -> RbacDecision<'p> {
    evaluate_rbac_readings(&rules.iter().map(|filter| &**filter), facts.readings()).enforced
}
