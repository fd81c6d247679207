//! The options of the admin, metrics and readiness ports, which all roles have.

use std::net::SocketAddr;

use clap::Args;
use weft_runtime::admin::AdminConfig;

use super::values;

#[derive(Debug, Args)]
pub(super) struct AdminPorts {
    /// Serve /metrics alone at this address, such as 0.0.0.0:15020.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Serve /ready and /live alone at this address, such as 0.0.0.0:15021.
    #[arg(long, value_name = "ADDRESS")]
    readiness: Option<SocketAddr>,
    /// Take orders (POST) at an admin address beyond loopback.
    #[arg(long)]
    allow_remote_admin_orders: bool,
    /// A name by which the admin port may be asked, beside addresses and localhost.
    #[arg(long = "admin-host", value_name = "NAME", value_parser = values::host_name)]
    admin_hosts: Vec<String>,
}

impl AdminPorts {
    /// The ports, with the admin port at this address.
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
