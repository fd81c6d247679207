//! What the authority did, a line each, in a file beside its store: who got which certificate, who was
//! refused, what was revoked, which tokens were made.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde_json::{Map, Value};

use crate::clock::wall_clock;

const FILE: &str = "audit.jsonl";

/// Appends a line to the file beside a store. That it cannot is told, and stops nothing: a workload without a
/// certificate is worse off than an authority without a line.
pub(crate) fn line(store: &Path, event: &str, fields: &[(&str, &str)]) {
    let seconds = wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut line = Map::new();
    line.insert("time".into(), seconds.into());
    line.insert("event".into(), event.into());
    for (name, value) in fields {
        line.insert((*name).into(), (*value).into());
    }
    let text = format!("{}\n", Value::Object(line));
    let path = store.with_file_name(FILE);
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    // One write, so that lines of two processes do not run into one another.
    if let Err(error) = file.and_then(|mut file| file.write_all(text.as_bytes())) {
        tracing::error!(path = %path.display(), %error, event, "the audit log was not written");
    }
}
