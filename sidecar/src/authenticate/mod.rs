//! Who asks: the peer proved by its certificate, and the subject proved by a token.

mod cache;
mod claims;
mod fault;
pub(crate) mod fetch;
pub(crate) mod key_store;
pub(crate) mod keys;
mod place;
mod token;
mod tokens;
#[cfg(test)]
mod wycheproof;

pub(crate) use cache::TokenCache;
pub(crate) use fault::TokenFault;
pub(crate) use tokens::{PlannedProvider, Proved, Tokens};

use std::net::IpAddr;
use std::time::SystemTime;

use weft_certs::VerifiedPeer;
use weft_model::path::Reading;
use weft_model::{RequestFacts, SpiffeId};

use crate::denial::Denial;
use crate::http::fields::Fields;
use crate::http::head::{RequestHead, path_of, query_of};
use tokens::Asking;

/// A request whose sender is known, as far as it was asked to prove it. Made only by
/// [`authenticate`].
#[derive(Debug)]
pub(crate) struct Authenticated<'a> {
    head: &'a RequestHead,
    sender: Sender<'a>,
    proved: Proved,
}

/// Who sends a request, and to where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sender<'a> {
    pub(crate) peer: Option<&'a VerifiedPeer>,
    /// The other end of the connection.
    pub(crate) address: IpAddr,
    /// The client, as trusted hops forwarded it.
    pub(crate) client: IpAddr,
    pub(crate) destination_port: u16,
}

/// What a decision may know of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts<'a> {
    pub(crate) head: &'a RequestHead,
    /// Path and query: the head's, or those that it had.
    pub(crate) target: &'a str,
    /// The same of the authority.
    pub(crate) authority: &'a str,
    /// The same of the headers.
    pub(crate) fields: &'a Fields,
    pub(crate) sender: Sender<'a>,
    pub(crate) proved: Option<&'a Proved>,
    /// Which reading of the path, where it has several.
    pub(crate) reading: usize,
}

impl<'a> Facts<'a> {
    /// The same request by each reading of its path.
    pub(crate) fn readings(self) -> impl Iterator<Item = Self> {
        let count = self.head.readings.as_ref().map_or(1, |readings| readings.iter().count());
        (0..count).map(move |reading| Self { reading, ..self })
    }

    fn reading(&self) -> Option<&'a Reading> {
        self.head.readings.as_ref()?.get(self.reading)
    }

    fn new(head: &'a RequestHead, sender: Sender<'a>, proved: Option<&'a Proved>) -> Self {
        Self {
            head,
            target: &head.target,
            authority: &head.authority,
            fields: &head.fields,
            sender,
            proved,
            reading: 0,
        }
    }
}

impl Authenticated<'_> {
    pub(crate) fn facts(&self) -> Facts<'_> {
        Facts::new(self.head, self.sender, Some(&self.proved))
    }

    /// What its tokens say.
    pub(crate) fn into_proved(self) -> Proved {
        self.proved
    }

    /// When the stream ends, where its token says so.
    pub(crate) fn ends(&self) -> Option<SystemTime> {
        self.proved.ends
    }
}

/// Checks the tokens of a request where `tokens` ask for one, and tells the service what they say.
///
/// # Errors
/// [`Denial::Token`].
pub(crate) fn authenticate<'a>(
    head: &'a mut RequestHead,
    sender: Sender<'a>,
    tokens: Option<&Tokens>,
    now: SystemTime,
    cache: &TokenCache,
) -> Result<Authenticated<'a>, Denial> {
    let proved = match tokens {
        Some(tokens) => {
            let rule = |head: &RequestHead| tokens.rule(&Facts::new(head, sender, None));
            let asking = Asking { peer: sender.peer, now, cache };
            let checked = tokens.check(head, rule, &asking);
            checked.map_err(|refused| Denial::Token(refused.fault, refused.detail))?
        }
        None => Proved::default(),
    };
    Ok(Authenticated { head, sender, proved })
}

impl RequestFacts for Facts<'_> {
    fn method(&self) -> &str {
        self.head.method.as_str()
    }

    fn path(&self) -> &str {
        self.reading().map_or_else(|| path_of(self.target), Reading::path)
    }

    fn path_fits(&self, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        match self.reading() {
            Some(reading) => reading.fits(fits),
            None => fits(path_of(self.target)),
        }
    }

    fn authority(&self) -> &str {
        self.authority
    }

    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        let mut found = false;
        self.fields.each(name, |value| found = found || fits(&String::from_utf8_lossy(value)));
        found
    }

    fn query(&self, name: &str) -> Option<&str> {
        query_of(self.target, name)
    }

    fn has_claim(&self, name: &str, way: &[String], fits: &mut dyn FnMut(&str) -> bool) -> bool {
        self.proved.is_some_and(|proved| proved.has_claim(name, way, fits))
    }

    fn peer(&self) -> Option<&SpiffeId> {
        self.sender.peer.and_then(VerifiedPeer::identity)
    }

    fn remote_address(&self) -> IpAddr {
        self.sender.address
    }

    fn client_address(&self) -> IpAddr {
        self.sender.client
    }

    fn destination_port(&self) -> u16 {
        self.sender.destination_port
    }
}

/// The SHA-256 of bytes.
fn digest(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut array = [0; 32];
    array.iter_mut().zip(digest.as_ref()).for_each(|(to, from)| *to = *from);
    array
}
