//! The verified tokens of a request.

use std::rc::Rc;
use std::time::SystemTime;

use serde_json::Value;
use weft_model::Name;

use super::cache::VerifiedToken;

/// The verified tokens of a request.
#[derive(Debug, Clone, Default)]
pub(crate) struct VerifiedTokens {
    /// The `sub` claim of the first token.
    pub(crate) subject: Option<String>,
    /// When the stream must end because one of the tokens expires.
    pub(crate) stream_deadline: Option<SystemTime>,
    pub(super) tokens: Vec<ProviderToken>,
}

/// A token that a provider verified.
#[derive(Debug, Clone)]
pub(super) struct ProviderToken {
    /// The name that policies refer to its payload by.
    pub(super) payload_name: Option<Name>,
    /// The provider's number in the plan.
    pub(super) provider: u64,
    pub(super) checked: Rc<VerifiedToken>,
}

impl VerifiedTokens {
    /// Whether a claim has a value that `fits` accepts. `way` is the path in the payload of that name.
    pub(crate) fn has_claim(
        &self,
        name: &str,
        way: &[String],
        fits: &mut dyn FnMut(&str) -> bool,
    ) -> bool {
        let payload = self.tokens.iter().find(|token| token.payload_name.as_deref() == Some(name));
        let Some((first, token)) = way.first().zip(payload) else {
            return false;
        };
        let first = token.checked.claims.get(first);
        let found = way.iter().skip(1).fold(first, |value, step| value.and_then(|v| v.get(step)));
        let one = |value: &Value, fits: &mut dyn FnMut(&str) -> bool| match value {
            Value::String(text) => fits(text),
            Value::Number(number) => fits(&number.to_string()),
            Value::Bool(flag) => fits(if *flag { "true" } else { "false" }),
            Value::Null | Value::Array(_) | Value::Object(_) => false,
        };
        match found {
            Some(Value::Array(values)) => values.iter().any(|value| one(value, fits)),
            Some(value) => one(value, fits),
            None => false,
        }
    }
}
