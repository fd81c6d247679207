//! Whether a request is allowed: a plain decision over what was proved.

use std::sync::Arc;

use weft_model::Rbac;

use crate::authenticate::{Authenticated, Facts};
use crate::denial::Denial;

/// A request that every policy allowed. Made only by [`authorize`].
#[derive(Debug)]
pub(crate) struct Authorized<'a>(Authenticated<'a>);

impl<'a> Authorized<'a> {
    pub(crate) fn facts(&self) -> Facts<'a> {
        self.0.facts()
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
    let facts = request.facts();
    if rules.iter().all(|rules| rules.allows(&facts)) {
        Ok(Authorized(request))
    } else {
        Err(Denial::NotAllowed)
    }
}
