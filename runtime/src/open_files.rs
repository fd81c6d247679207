//! The limit of open files.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit of open files as far as the host allows without asking. The usual default of 1024
/// is low for the sake of programs that use `select`, which nothing here does; what a process may
/// hold is decided by its own limits of connections and flows.
pub fn raise_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::info!(%error, "the limit of open files stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_becomes_what_the_host_allows() {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("every process has one");
        setrlimit(Resource::RLIMIT_NOFILE, most.min(256), most).expect("lowering is allowed");
        raise_limit();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE), Ok((most, most)));
    }
}
