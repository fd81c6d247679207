//! HTTP/1.1 and HTTP/2: version-independent heads and bodies, the codecs of both versions, and the checks on requests.

pub(crate) mod authority;
pub(crate) mod body;
pub(crate) mod body_error;
pub(crate) mod desync;
pub(crate) mod forward_body;
pub(crate) mod h1;
pub(crate) mod h2;
pub(crate) mod h2_budget;
pub(crate) mod h2_client_guard;
pub(crate) mod h2_endpoint_guard;
mod h2_frames;
pub(crate) mod h2_keepalive;
mod h2_reset;
mod h2_shutdown;
pub(crate) mod head;
pub(crate) mod header_filter;
pub(crate) mod headers;
mod name_set;
pub(crate) mod path;
mod read_ahead;
#[cfg(test)]
pub(crate) mod test_head;
