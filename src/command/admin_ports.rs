//! Options for the admin, metrics and readiness ports of every role.

use std::net::SocketAddr;

use clap::Args;
use weft_runtime::admin::AdminConfig;

use super::values;

#[derive(Debug, Args)]
pub(super) struct AdminPortArgs {
    /// Listen address for /metrics only, such as 0.0.0.0:15020
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Listen address for /ready and /live only, such as 0.0.0.0:15021
    #[arg(long, value_name = "ADDRESS")]
    readiness: Option<SocketAddr>,
    /// Accept POST requests on a non-loopback admin address
    #[arg(long)]
    allow_remote_admin_orders: bool,
    /// Additional host name accepted in requests to the admin port (IP addresses and localhost always are)
    #[arg(long = "admin-host", value_name = "NAME", value_parser = values::host_name)]
    admin_hosts: Vec<String>,
}

impl AdminPortArgs {
    /// The listen configuration, with the admin port at `admin`.
    pub(super) fn with(&self, admin: Option<SocketAddr>) -> AdminConfig {
        AdminConfig {
            admin,
            metrics: self.metrics,
            readiness: self.readiness,
            allows_remote_post: self.allow_remote_admin_orders,
            host_names: self.admin_hosts.clone(),
        }
    }
}
