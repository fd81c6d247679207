//! How CRLs are applied: the custom validator `weft.revocation` of a validation context.

use std::time::Duration;

use envoy_types::util::pack_any;
use weft_model::{
    DistributionPoint, ExpiredCrlAction, RevocationDepth, RevocationMode, RevocationPolicy,
    Validation,
};

use super::pb::{core, google};
use super::reader::MISSING;
use super::struct_value::{StructFields, list, number, object, text};
use super::{FieldError, MessageReader, values};

/// The name of weft's validator, and its settings.
const REVOCATION: &str = "weft.revocation";
const MODE: &str = "mode";
const ON_EXPIRED: &str = "on_expired";
const DEPTH: &str = "depth";
const DRAIN: &str = "drain_seconds";
const BYTES_LIMIT: &str = "bytes_limit";
const ENTRIES_LIMIT: &str = "entries_limit";
const POINTS: &str = "distribution_points";
const URI: &str = "uri";
const CLUSTER: &str = "cluster";
const REFRESH: &str = "refresh_seconds";

/// The most distribution points, and the default refresh interval in seconds.
const POINTS_LIMIT: usize = 30;
const REFRESH_DEFAULT: u64 = 300;

/// Reads the CRL settings for which Envoy has no field: a custom validator with a `google.protobuf.Struct`.
pub(super) fn revocation_policy(
    mut ours: MessageReader<'_>,
    policy: &mut RevocationPolicy,
    points: &mut Vec<DistributionPoint>,
) -> Result<(), FieldError> {
    let name = ours.text("name");
    if name != REVOCATION {
        let right = format!("unknown validator {name:?}: must be {REVOCATION}");
        return Err(ours.refuse("name", right));
    }
    let Some(mut settings) = ours.any("typed_config")? else {
        return Err(ours.refuse("typed_config", MISSING));
    };
    if settings.kind() != "google.protobuf.Struct" {
        let kind = settings.kind();
        return Err(
            settings.refuse("", format!("unsupported type {kind}: must be google.protobuf.Struct"))
        );
    }
    for (field, mut value) in settings.map("fields") {
        match field.as_str() {
            MODE => policy.mode = word(value, &RevocationMode::WORDS)?,
            ON_EXPIRED => policy.on_expired = word(value, &ExpiredCrlAction::WORDS)?,
            DEPTH => policy.depth = word(value, &RevocationDepth::WORDS)?,
            DRAIN => policy.drain = Duration::from_secs(whole(value)? as u64),
            BYTES_LIMIT => policy.bytes_limit = whole(value)?,
            ENTRIES_LIMIT => policy.entries_limit = whole(value)?,
            POINTS => {
                let list = value.child("list_value").map(|mut list| list.children("values"));
                *points = values::each(list.unwrap_or_default(), point)?;
                if points.is_empty() || points.len() > POINTS_LIMIT {
                    let right =
                        format!("must be a list of 1 to {POINTS_LIMIT} distribution points");
                    return Err(value.refuse("", right));
                }
            }
            _ => {
                let known = [MODE, ON_EXPIRED, DEPTH, DRAIN, BYTES_LIMIT, ENTRIES_LIMIT, POINTS];
                let known = known.join(", ");
                return Err(
                    value.refuse("", format!("unknown field {field:?}: must be one of {known}"))
                );
            }
        }
    }
    Ok(())
}

/// A distribution point: `{uri, cluster, refresh_seconds}`.
fn point(mut value: MessageReader<'_>) -> Result<DistributionPoint, FieldError> {
    let mut uri = String::new();
    let mut cluster = String::new();
    let mut refresh = REFRESH_DEFAULT;
    let Some(mut fields) = value.child("struct_value") else {
        return Err(value.refuse("", format!("must be an object with {URI} and {CLUSTER}")));
    };
    for (field, mut value) in fields.map("fields") {
        match field.as_str() {
            URI => uri = value.text("string_value"),
            CLUSTER => cluster = value.text("string_value"),
            REFRESH => refresh = whole(value)?.max(1) as u64,
            _ => {
                let known = [URI, CLUSTER, REFRESH].join(", ");
                return Err(
                    value.refuse("", format!("unknown field {field:?}: must be one of {known}"))
                );
            }
        }
    }
    if !["http://", "https://"].iter().any(|scheme| uri.starts_with(scheme)) {
        let right = format!("invalid {URI} {uri:?}: must be http://HOST/PATH or https://HOST/PATH");
        return Err(value.refuse(URI, right));
    }
    if cluster.is_empty() {
        return Err(value.refuse(
            CLUSTER,
            "this field is missing: it must name the cluster that serves the CRL",
        ));
    }
    Ok(DistributionPoint { uri, cluster: cluster.into(), refresh: Duration::from_secs(refresh) })
}

/// One of several named values.
fn word<T: Copy>(
    mut value: MessageReader<'_>,
    words: &[(&'static str, T)],
) -> Result<T, FieldError> {
    let said = value.text("string_value");
    let found = words.iter().find(|(word, _)| *word == said);
    found.map(|(_, meant)| *meant).ok_or_else(|| {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        value.refuse("", format!("invalid value {said:?}: must be one of {}", known.join(", ")))
    })
}

fn whole(mut value: MessageReader<'_>) -> Result<usize, FieldError> {
    let number = value.number("number_value").and_then(|number| usize::try_from(number).ok());
    number.ok_or_else(|| value.refuse("", "must be a whole number, 0 or more"))
}

/// Encodes the settings that differ from the defaults; none when all have their defaults.
pub(super) fn encode_revocation_policy(
    validation: &Validation,
) -> Option<core::TypedExtensionConfig> {
    let policy = &validation.policy;
    let default = RevocationPolicy::default();
    let mut fields = StructFields::new();
    let mut add = |name: &str, differs: bool, value: google::Value| {
        if differs {
            fields.insert(name.into(), value);
        }
    };
    let mode = word_of(&policy.mode, &RevocationMode::WORDS);
    add(MODE, policy.mode != default.mode, text(mode));
    let on_expired = word_of(&policy.on_expired, &ExpiredCrlAction::WORDS);
    add(ON_EXPIRED, policy.on_expired != default.on_expired, text(on_expired));
    add(DRAIN, policy.drain != default.drain, number(policy.drain.as_secs()));
    let bytes = policy.bytes_limit;
    let entries = policy.entries_limit;
    add(BYTES_LIMIT, bytes != default.bytes_limit, number(bytes as u64));
    add(ENTRIES_LIMIT, entries != default.entries_limit, number(entries as u64));
    let points = list(validation.points.iter().map(encode_point));
    add(POINTS, !validation.points.is_empty(), points);
    (!fields.is_empty()).then(|| core::TypedExtensionConfig {
        name: REVOCATION.into(),
        typed_config: Some(pack_any(google::Struct { fields })),
    })
}

fn word_of<T: PartialEq>(value: &T, words: &[(&'static str, T)]) -> &'static str {
    words.iter().find(|(_, known)| known == value).map_or("", |(word, _)| word)
}

fn encode_point(point: &DistributionPoint) -> google::Value {
    object(StructFields::from([
        (URI.into(), text(&*point.uri)),
        (CLUSTER.into(), text(&*point.cluster)),
        (REFRESH.into(), number(point.refresh.as_secs())),
    ]))
}
