//! Who asks: the peer proved by its certificate, and the subject proved by a token.

pub(crate) mod fetch;
mod jwt;
pub(crate) mod keys;
#[cfg(test)]
mod wycheproof;

pub(crate) use jwt::{PlannedProvider, Tokens};

use std::net::IpAddr;
use std::time::SystemTime;

use weft_certs::VerifiedPeer;
use weft_model::{RequestFacts, SpiffeId};

use crate::denial::Denial;
use crate::http::head::RequestHead;

/// A request whose sender is known, as far as it was asked to prove it. Made only by
/// [`authenticate`].
#[derive(Debug)]
pub(crate) struct Authenticated<'a> {
    facts: Facts<'a>,
    subject: Option<String>,
}

/// What a decision may know of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts<'a> {
    pub(crate) head: &'a RequestHead,
    pub(crate) peer: Option<&'a VerifiedPeer>,
    pub(crate) remote: IpAddr,
    pub(crate) destination_port: u16,
}

impl<'a> Authenticated<'a> {
    pub(crate) fn facts(&self) -> Facts<'a> {
        self.facts
    }

    /// The `sub` of the token, if one was checked.
    pub(crate) fn subject(&self) -> Option<&str> {
        self.subject.as_deref()
    }
}

/// Checks the token of a request where `tokens` ask for one.
///
/// # Errors
/// [`Denial::TokenMissing`] or [`Denial::TokenInvalid`].
pub(crate) fn authenticate<'a>(
    facts: Facts<'a>,
    tokens: Option<&Tokens>,
    now: SystemTime,
) -> Result<Authenticated<'a>, Denial> {
    let subject = match tokens {
        Some(tokens) => tokens.check(&facts, now)?,
        None => None,
    };
    Ok(Authenticated { facts, subject })
}

impl RequestFacts for Facts<'_> {
    fn method(&self) -> &str {
        self.head.method.as_str()
    }

    fn path(&self) -> &str {
        self.head.path()
    }

    fn authority(&self) -> &str {
        &self.head.authority
    }

    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        let mut found = false;
        self.head.fields.each(name, |value| found = found || fits(&String::from_utf8_lossy(value)));
        found
    }

    fn query(&self, name: &str) -> Option<&str> {
        self.head.query(name)
    }

    fn peer(&self) -> Option<&SpiffeId> {
        self.peer.and_then(VerifiedPeer::identity)
    }

    fn remote_address(&self) -> IpAddr {
        self.remote
    }

    fn destination_port(&self) -> u16 {
        self.destination_port
    }
}
