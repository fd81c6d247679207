//! How full the conntrack table is. When it is full, the kernel silently drops every new flow of the host, on both
//! paths; so the agent warns before.

use std::fmt;

/// Percent from which on the agent warns.
const WARN_PERCENT: u64 = 80;
/// Percent below which the warning is cleared.
const CLEAR_PERCENT: u64 = 70;
/// Percent from which on the table counts as full: new flows are dropped, or are about to be.
const FULL_PERCENT: u64 = 99;

/// The occupancy of the conntrack table of this network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupancy {
    /// The number of entries.
    pub entries: u64,
    /// The limit of entries.
    pub limit: u64,
}

/// The level of an occupancy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OccupancyLevel {
    /// The table has enough room.
    #[default]
    Normal,
    /// The table is filling up: an operator should act.
    Filling,
    /// The table is full: new flows are dropped.
    Full,
}

impl Occupancy {
    /// Reads the current occupancy; `None` where the kernel does not say.
    pub(super) fn read() -> Option<Self> {
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/net/netfilter/{name}")).ok()?;
            text.trim().parse().ok()
        };
        Some(Self { entries: read("nf_conntrack_count")?, limit: read("nf_conntrack_max")? })
    }

    /// Logs a change of level, and returns the new level.
    pub(super) fn log_level_change(self, before: OccupancyLevel) -> OccupancyLevel {
        let level = self.level(before);
        if level != before {
            let advice =
                "raise net.netfilter.nf_conntrack_max, or find what opens so many connections";
            match level {
                OccupancyLevel::Normal => {
                    tracing::info!(occupancy = %self, "conntrack table has room again")
                }
                OccupancyLevel::Filling => {
                    tracing::warn!(occupancy = %self, advice, "conntrack table is filling up");
                }
                OccupancyLevel::Full => tracing::error!(
                    occupancy = %self,
                    advice,
                    "conntrack table is full: the kernel drops new flows of this host"
                ),
            }
        }
        level
    }

    /// The level, given the level before. The gap between the thresholds prevents flapping.
    fn level(self, before: OccupancyLevel) -> OccupancyLevel {
        // The kernel takes a limit of 0 as unlimited.
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
    fn level_changes_once_on_the_way_up_and_once_on_the_way_down() {
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
