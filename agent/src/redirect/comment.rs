//! The comment on installed rules, by which weft recognises them.

use std::hash::Hasher as _;

use super::config::RedirectConfig;
use super::nft;

impl RedirectConfig {
    /// A hash of the rules of this configuration. It is made of their text for the `nft` command, which is the same for
    /// every backend and release that installs the same rules.
    #[must_use]
    pub fn hash(&self) -> String {
        let mut hasher = siphasher::sip::SipHasher13::new();
        hasher.write(nft::render_chains(self).as_bytes());
        format!("{:016x}", hasher.finish())
    }

    /// The comment of the table or chain: its owner, how often the rules were installed, and the hash of the
    /// rules.
    #[must_use]
    pub fn comment(&self, generation: u64) -> String {
        format!("owner={} generation={generation} hash={}", self.owner, self.hash())
    }

    /// Whether a comment has this owner and hash, in any generation.
    pub(super) fn matches_comment(&self, comment: &str) -> bool {
        let owner = format!("owner={}", self.owner);
        let hash = format!("hash={}", self.hash());
        [owner, hash].iter().all(|desired| words(comment).any(|word| word == desired))
    }
}

/// The words of a comment, in the output of any tool.
fn words(comment: &str) -> impl Iterator<Item = &str> {
    comment.split_whitespace().map(|word| word.trim_matches('"'))
}

/// The generation in a comment; 0 when there is none.
pub(super) fn generation(comment: &str) -> u64 {
    words(comment).find_map(|word| word.strip_prefix("generation=")?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{node, workload};
    use super::*;

    #[test]
    fn hash_is_the_same_in_every_release() {
        assert_eq!(workload().hash(), "038a46025b583b01");
        assert_eq!(node().hash(), "4f870fde4e34f61b");
    }

    #[test]
    fn hash_changes_with_every_setting_that_changes_a_rule() {
        let changed = [
            RedirectConfig { exclude_outbound_ports: vec![1], ..workload() },
            RedirectConfig { outbound: Some(15007), ..workload() },
            RedirectConfig { strict: true, ..workload() },
            RedirectConfig { mark: 0x53a, ..workload() },
            RedirectConfig { uid: None, ..workload() },
            RedirectConfig { keep_source: true, ..workload() },
        ];
        for redirect in changed {
            assert_ne!(redirect.hash(), workload().hash(), "{redirect:?}");
        }
        let renamed = RedirectConfig { owner: "other".into(), ..workload() };
        assert_eq!(renamed.hash(), workload().hash(), "the owner is in the comment itself");
    }

    #[test]
    fn comment_is_recognised_by_owner_and_hash_in_any_generation() {
        let comment = workload().comment(7);
        assert!(workload().matches_comment(&comment));
        assert_eq!(generation(&comment), 7);
        assert_eq!(generation("no comment of ours"), 0);
        let renamed = RedirectConfig { owner: "other".into(), ..workload() };
        assert!(!renamed.matches_comment(&comment));
        assert!(!node().matches_comment(&comment));
    }
}
