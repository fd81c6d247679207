//! JWT settings for which Envoy has no field: the filter chain's metadata, under `weft`, `jwt` and the provider's name.

use std::collections::BTreeMap;

use weft_model::{ClaimFormat, ClaimRule, JwtProvider, KeySource, REDIRECTS_LIMIT};

use super::super::pb::google;
use super::super::struct_value::{self, StructFields, flag, number, object, text};
use super::super::{FieldError, MessageReader};

const CLAIMS: &str = "claims";
const ANY_AUDIENCE: &str = "any_audience";
const BOUND: &str = "bound_to_certificate";
const ENDS_STREAMS: &str = "ends_streams";
const REDIRECTS: &str = "redirects";

/// The most claim rules of a provider, and the most values of a rule.
const LIMIT: usize = 10;

/// The settings of one provider.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct OurProvider {
    pub(super) claims: Vec<ClaimRule>,
    pub(super) any_audience: bool,
    pub(super) bound: bool,
    pub(super) ends_streams: bool,
    /// How many redirects are followed to the key set.
    pub(super) redirects: u8,
}

/// Reads the settings of all providers.
pub(super) fn read(
    mut value: MessageReader<'_>,
) -> Result<BTreeMap<String, OurProvider>, FieldError> {
    let mut providers = BTreeMap::new();
    for (name, provider) in fields(&mut value)? {
        providers.insert(name, one(provider)?);
    }
    Ok(providers)
}

fn one(mut value: MessageReader<'_>) -> Result<OurProvider, FieldError> {
    let mut ours = OurProvider::default();
    for (field, mut value) in fields(&mut value)? {
        match field.as_str() {
            CLAIMS => {
                ours.claims = list(&mut value)?.into_iter().map(claim).collect::<Result<_, _>>()?
            }
            ANY_AUDIENCE => ours.any_audience = yes(&mut value)?,
            BOUND => ours.bound = yes(&mut value)?,
            ENDS_STREAMS => ours.ends_streams = yes(&mut value)?,
            REDIRECTS => ours.redirects = redirects(&mut value)?,
            _ => {
                let known = [CLAIMS, ANY_AUDIENCE, BOUND, ENDS_STREAMS, REDIRECTS].join(", ");
                return Err(
                    value.refuse("", format!("unknown field {field:?}: must be one of {known}"))
                );
            }
        }
    }
    Ok(ours)
}

fn claim(mut value: MessageReader<'_>) -> Result<ClaimRule, FieldError> {
    let mut rule = ClaimRule {
        name: String::new(),
        format: ClaimFormat::Single,
        values: Vec::new(),
        all: false,
    };
    for (field, mut value) in fields(&mut value)? {
        match field.as_str() {
            "name" => rule.name = value.text("string_value"),
            "format" => {
                let said = value.text("string_value");
                let known = ClaimFormat::WORDS.iter().find(|(word, _)| *word == said);
                rule.format = known.map(|(_, format)| *format).ok_or_else(|| {
                    let known: Vec<&str> =
                        ClaimFormat::WORDS.iter().map(|(word, _)| *word).collect();
                    let known = known.join(", ");
                    value.refuse("", format!("invalid format {said:?}: must be one of {known}"))
                })?;
            }
            "values" => {
                let values = list(&mut value)?.into_iter().map(|mut v| v.text("string_value"));
                rule.values = values.collect();
            }
            "all" => rule.all = yes(&mut value)?,
            _ => {
                let known = "name, format, values, all";
                let reason = format!("unknown field {field:?}: must be one of {known}");
                return Err(value.refuse("", reason));
            }
        }
    }
    if ["", "iss", "aud", "exp", "nbf", "iat"].contains(&rule.name.as_str()) {
        let reason =
            format!("invalid claim {:?}: must not be iss, aud, exp, nbf or iat", rule.name);
        return Err(value.refuse("", reason));
    }
    if rule.values.is_empty() || rule.values.iter().any(String::is_empty) {
        return Err(value.refuse("", "values must be a list of at least one non-empty string"));
    }
    if rule.values.len() > LIMIT {
        return Err(value.refuse("", format!("too many values: at most {LIMIT} are accepted")));
    }
    Ok(rule)
}

fn fields<'f>(
    value: &mut MessageReader<'f>,
) -> Result<Vec<(String, MessageReader<'f>)>, FieldError> {
    match value.child("struct_value") {
        Some(mut fields) => Ok(fields.map("fields")),
        None => Err(value.refuse("", "must be an object")),
    }
}

fn list<'f>(value: &mut MessageReader<'f>) -> Result<Vec<MessageReader<'f>>, FieldError> {
    let Some(mut list) = value.child("list_value") else {
        return Err(value.refuse("", "must be a list"));
    };
    let values = list.children("values");
    if values.len() > LIMIT {
        return Err(value.refuse("", format!("too many items: at most {LIMIT} are accepted")));
    }
    Ok(values)
}

fn yes(value: &mut MessageReader<'_>) -> Result<bool, FieldError> {
    value.flag("bool_value").ok_or_else(|| value.refuse("", "must be true or false"))
}

fn redirects(value: &mut MessageReader<'_>) -> Result<u8, FieldError> {
    let said = value.number("number_value");
    let count = (0..=REDIRECTS_LIMIT).find(|count| Some(u32::from(*count)) == said);
    count.ok_or_else(|| value.refuse("", format!("must be a whole number, 0 to {REDIRECTS_LIMIT}")))
}

/// Encodes the settings of a provider for which Envoy has no field.
pub(super) fn encode(provider: &JwtProvider) -> StructFields {
    let mut ours = StructFields::new();
    if !provider.claims.is_empty() {
        let claims = struct_value::list(provider.claims.iter().map(encode_claim));
        ours.insert(CLAIMS.into(), claims);
    }
    for (name, is_set) in [
        (ANY_AUDIENCE, provider.audiences.is_empty()),
        (BOUND, provider.bound),
        (ENDS_STREAMS, provider.ends_streams),
    ] {
        if is_set {
            ours.insert(name.into(), flag(true));
        }
    }
    if let KeySource::Http { redirects: redirects @ 1.., .. } = &provider.keys {
        ours.insert(REDIRECTS.into(), number((*redirects).into()));
    }
    ours
}

fn encode_claim(rule: &ClaimRule) -> google::Value {
    let mut words = ClaimFormat::WORDS.iter();
    let word = words.find(|(_, known)| *known == rule.format).map_or("", |(word, _)| word);
    object(StructFields::from([
        ("name".into(), text(&*rule.name)),
        ("format".into(), text(word)),
        ("values".into(), struct_value::list(rule.values.iter().map(text))),
        ("all".into(), flag(rule.all)),
    ]))
}
