//! HTTP in both versions: one head and one body in the middle, codecs at both ends.

mod ahead;
pub(crate) mod authority;
pub(crate) mod body;
pub(crate) mod desync;
pub(crate) mod fields;
pub(crate) mod h1;
pub(crate) mod h2;
pub(crate) mod h2_blocked;
pub(crate) mod h2_budget;
mod h2_ending;
mod h2_frames;
pub(crate) mod h2_guard;
pub(crate) mod h2_keepalive;
mod h2_refusal;
pub(crate) mod head;
mod name_set;
pub(crate) mod path;
pub(crate) mod unwanted;
