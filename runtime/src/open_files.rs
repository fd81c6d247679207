//! The limit of open file descriptors.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard limit. The usual soft limit of 1024 protects programs that
/// use `select`, which weft does not; the limits on connections and flows bound what a process opens.
pub fn raise_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::info!(%error, "open file limit not raised");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_limit_is_raised_to_the_hard_limit() {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("every process has this limit");
        setrlimit(Resource::RLIMIT_NOFILE, most.min(256), most).expect("lowering is allowed");
        raise_limit();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE), Ok((most, most)));
    }
}
