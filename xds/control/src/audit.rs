//! The audit log of the authority: one JSON line for each certificate that was issued or refused, each revocation and
//! each join token. The file is in the folder of the store.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde_json::{Map, Value};

use crate::clock::wall_clock;

const FILE: &str = "audit.jsonl";

/// Appends a line to the audit log of a store. A failure is logged and changes nothing else: a workload without a
/// certificate is worse than an audit log without a line.
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
    // A single write, so that the lines of two processes are not mixed.
    if let Err(error) = file.and_then(|mut file| file.write_all(text.as_bytes())) {
        tracing::error!(path = %path.display(), %error, event, "failed to write audit log");
    }
}
