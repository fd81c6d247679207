//! Authenticates requests: the peer by its certificate, the subject by a token.

mod cache;
mod claims;
mod fault;
pub(crate) mod fetch;
pub(crate) mod key_store;
mod token;
mod token_location;
mod tokens;
pub(crate) mod verified;
#[cfg(test)]
mod wycheproof;

pub(crate) use cache::TokenCache;
pub(crate) use fault::TokenFault;
pub(crate) use tokens::{PlannedProvider, TokenPolicy};

use std::time::SystemTime;

use crate::denial::Denial;
use crate::http::head::RequestHead;
use crate::request_facts::{ClientInfo, HttpRequestFacts};
use tokens::{RuleIndexes, TokenContext};
use verified::VerifiedTokens;

/// A request whose required tokens were verified. Only [`authenticate`] makes one.
#[derive(Debug)]
pub(crate) struct Authenticated<'a> {
    head: &'a RequestHead,
    client: ClientInfo<'a>,
    tokens: VerifiedTokens,
}

impl Authenticated<'_> {
    pub(crate) fn facts(&self) -> HttpRequestFacts<'_> {
        HttpRequestFacts::new(self.head, self.client, Some(&self.tokens))
    }

    /// The verified tokens.
    pub(crate) fn into_tokens(self) -> VerifiedTokens {
        self.tokens
    }

    /// When the stream must end because its token expires.
    pub(crate) fn stream_deadline(&self) -> Option<SystemTime> {
        self.tokens.stream_deadline
    }
}

/// Verifies the tokens that `tokens` requires, and writes their claims to headers for the service.
///
/// # Errors
/// [`Denial::Token`] when a required token is missing or rejected.
pub(crate) fn authenticate<'a>(
    head: &'a mut RequestHead,
    client: ClientInfo<'a>,
    tokens: Option<&TokenPolicy>,
    now: SystemTime,
    cache: &TokenCache,
) -> Result<Authenticated<'a>, Denial> {
    let proved = match tokens {
        Some(tokens) => {
            let rules = |head: &RequestHead| {
                let mut rules = RuleIndexes::default();
                for facts in HttpRequestFacts::new(head, client, None).readings() {
                    rules.add(tokens.rule(&facts));
                }
                rules
            };
            let context = TokenContext { peer: client.peer, now, cache };
            let checked = tokens.check(head, rules, &context);
            checked.map_err(|refused| Denial::Token(refused.fault, refused.detail))?
        }
        None => VerifiedTokens::default(),
    };
    Ok(Authenticated { head, client, tokens: proved })
}
