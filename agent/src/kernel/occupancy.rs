//! How full the kernel's table of connections is. When it is full the kernel drops every new flow of
//! the host without a word, on both paths; so it is told before.

use std::fmt;

/// From here on it is told, in percent.
const WARN_PERCENT: u64 = 80;
/// Below, it is no longer.
const CLEAR_PERCENT: u64 = 70;
/// From here on new flows are about to be dropped, or are.
const FULL_PERCENT: u64 = 99;

/// The kernel's table of connections, of this network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupancy {
    /// How many connections it holds.
    pub entries: u64,
    /// How many it may.
    pub limit: u64,
}

/// What that means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OccupancyLevel {
    /// There is room.
    #[default]
    Normal,
    /// Somebody should make room.
    Filling,
    /// New flows are dropped.
    Full,
}

impl Occupancy {
    /// As it is now; none where the kernel does not tell.
    pub(super) fn read() -> Option<Self> {
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/net/netfilter/{name}")).ok()?;
            text.trim().parse().ok()
        };
        Some(Self { entries: read("nf_conntrack_count")?, limit: read("nf_conntrack_max")? })
    }

    /// Logs what it means, when that is another thing than before; gives what it means.
    pub(super) fn log_level_change(self, before: OccupancyLevel) -> OccupancyLevel {
        let level = self.level(before);
        if level != before {
            let advice = "raise net.netfilter.nf_conntrack_max, or find who opens so many";
            match level {
                OccupancyLevel::Normal => {
                    tracing::info!(read = %self, "the kernel's table has room again")
                }
                OccupancyLevel::Filling => {
                    tracing::warn!(read = %self, advice, "the kernel's table of connections fills up");
                }
                OccupancyLevel::Full => tracing::error!(
                    read = %self,
                    advice,
                    "the kernel's table of connections is full: it drops new flows of this host, whoever serves them"
                ),
            }
        }
        level
    }

    /// What it means, after what it meant before: at the edge it does not go to and fro.
    fn level(self, before: OccupancyLevel) -> OccupancyLevel {
        // A limit of 0 is none.
        let percent = (self.entries * 100).checked_div(self.limit).unwrap_or(0);
        match before {
            _ if percent >= FULL_PERCENT => OccupancyLevel::Full,
            _ if percent >= WARN_PERCENT => OccupancyLevel::Filling,
            OccupancyLevel::Filling | OccupancyLevel::Full if percent >= CLEAR_PERCENT => {
                OccupancyLevel::Filling
            }
            OccupancyLevel::Normal | OccupancyLevel::Filling | OccupancyLevel::Full => {
                OccupancyLevel::Normal
            }
        }
    }
}

impl fmt::Display for Occupancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} connections", self.entries, self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_once_on_the_way_up_and_once_on_the_way_down() {
        let mut level = OccupancyLevel::Normal;
        for (entries, expected) in [
            (0, OccupancyLevel::Normal),
            (79, OccupancyLevel::Normal),
            (80, OccupancyLevel::Filling),
            (75, OccupancyLevel::Filling),
            (99, OccupancyLevel::Full),
            (100, OccupancyLevel::Full),
            (98, OccupancyLevel::Filling),
            (70, OccupancyLevel::Filling),
            (69, OccupancyLevel::Normal),
            (79, OccupancyLevel::Normal),
            (120, OccupancyLevel::Full),
            (0, OccupancyLevel::Normal),
        ] {
            level = Occupancy { entries, limit: 100 }.level(level);
            assert_eq!(level, expected, "{entries} %");
        }
        assert_eq!(
            Occupancy { entries: 7, limit: 0 }.level(OccupancyLevel::Full),
            OccupancyLevel::Normal
        );
    }
}
