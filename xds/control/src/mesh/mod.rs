//! `mesh.yaml`: services, routes in the shape of the Gateway API's HTTPRoute, and authorization policies.
//!
//! [`raw`] has the types that the file is deserialized to. [`Mesh`] is the checked form, with all names resolved and all
//! values parsed. `check` turns one into the other, and collects every error.

mod check;
mod checked;
mod duration;
mod file;
mod parse_errors;
mod path_rewrite;
pub mod raw;
mod raw_number;
pub mod raw_routes;
mod reader;
mod referenced_files;
mod sections;
pub(crate) mod token_rules;

pub use checked::{
    Clause, HttpTuning, Issuer, KeyServer, KeyServerRoots, Mesh, MeshRoute, OutboundPolicy, Policy,
    Port, Protocol, RouteParent, RouteRule, RouteTarget, Service, TokenKeys, identity,
};
pub use file::MeshFile;
pub use path_rewrite::prefix_rewrite;

use std::path::Path;

use weft_xds::located::ConfigError;

impl Mesh {
    /// Parses and checks a mesh. Paths of files in it are relative to `folder`.
    ///
    /// # Errors
    /// Every error in the text, with line and field.
    pub fn parse(text: &str, folder: &Path) -> Result<Self, Vec<ConfigError>> {
        reader::MeshReader::default()
            .read(&text.into(), &referenced_files::ReferencedFiles::below(folder))
    }
}

#[cfg(test)]
mod tests;
