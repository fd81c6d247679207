//! Whether a request is allowed: a plain decision over what was proved.

use std::sync::Arc;
use std::time::SystemTime;

use weft_model::Rbac;

use crate::authenticate::{Authenticated, Facts};
use crate::denial::Denial;

/// A request that every policy allowed. Made only by [`authorize`].
#[derive(Debug)]
pub(crate) struct Authorized<'a>(Authenticated<'a>);

impl Authorized<'_> {
    pub(crate) fn facts(&self) -> Facts<'_> {
        self.0.facts()
    }

    /// When the stream ends, where its token says so.
    pub(crate) fn ends(&self) -> Option<SystemTime> {
        self.0.ends()
    }

    pub(crate) fn subject(&self) -> Option<&str> {
        self.0.subject()
    }
}

/// Allows a request that each of `rules` allows.
///
/// # Errors
/// [`Denial::NotAllowed`].
pub(crate) fn authorize<'a>(
    request: Authenticated<'a>,
    rules: &[Arc<Rbac>],
) -> Result<Authorized<'a>, Denial> {
    let allowed = rules.iter().all(|rules| rules.allows(&request.facts()));
    if allowed { Ok(Authorized(request)) } else { Err(Denial::NotAllowed) }
}
