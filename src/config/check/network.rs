//! The flags of the pod network.

use std::path::PathBuf;

use super::Check;
use crate::config::Environment;
use crate::host::tunnel::Encapsulation;
use crate::network::cni_file;
use crate::network::node_address::{Method, Methods};
use crate::network::settings::{Reach, Settings};
use crate::proxy;

impl Check<'_> {
    /// Checked whether the room runs or not, so that a mistake shows before it is switched on. `None` when
    /// something is wrong.
    pub(super) fn network(
        &mut self,
        services: &proxy::Settings,
        environment: &Environment,
    ) -> Option<Settings> {
        let before = self.mistakes.len();
        let settings = Settings {
            node_name: services.node_name.clone(),
            audit_period: self.period("injected-routes-sync-period"),
            overlay: self.overlay(),
            encapsulation: self.encapsulation(),
            egress: self.switch("enable-pod-egress"),
            egress_exclude: self.cidrs("pod-egress-exclude-cidrs"),
            auto_mtu: self.switch("auto-mtu"),
            cni_file: self.cni_file(environment),
            addresses: self.methods(),
            disable_source_check: self.switch("disable-source-dest-check"),
        };
        (self.mistakes.len() == before).then_some(settings)
    }

    fn overlay(&mut self) -> Reach {
        let reach = match self.given.text("overlay-type") {
            "subnet" => Reach::Subnet,
            "full" => Reach::Full,
            other => {
                let text = format!("--overlay-type={other}: write subnet or full");
                self.meaning(text);
                Reach::Subnet
            }
        };
        if self.switch("enable-overlay") { reach } else { Reach::Off }
    }

    fn encapsulation(&mut self) -> Encapsulation {
        self.within("overlay-encap-port", 1024, 65535);
        let port = self.number("overlay-encap-port").and_then(|port| u16::try_from(port).ok());
        match self.given.text("overlay-encap") {
            "ipip" => Encapsulation::Plain,
            // A wrong one was told.
            "fou" => Encapsulation::Gue(port.unwrap_or_default()),
            other => {
                let text = format!("--overlay-encap={other}: write ipip or fou");
                self.meaning(text);
                Encapsulation::Plain
            }
        }
    }

    fn cni_file(&mut self, environment: &Environment) -> Option<PathBuf> {
        if !self.switch("enable-cni") {
            return None;
        }
        let given = environment.cni_conf_file.as_deref().map(str::trim).filter(|path| !path.is_empty());
        let path = PathBuf::from(given.unwrap_or(cni_file::DEFAULT));
        if !path.is_absolute() {
            self.meaning(format!(
                "environment variable KUBE_ROUTER_CNI_CONF_FILE={}: must be an absolute path",
                path.display()
            ));
        }
        Some(path)
    }

    /// How this node's addresses are chosen. Called twice; a mistake is told once.
    pub(super) fn methods(&mut self) -> Methods {
        let source = self.method("bgp-source-address");
        let next_hop = self.method("bgp-next-hop-address");
        let overlay = if self.given.text("overlay-address").is_empty() {
            next_hop.clone()
        } else {
            self.method("overlay-address")
        };
        Methods { source, next_hop, overlay }
    }

    fn method(&mut self, name: &str) -> Method {
        self.given.text(name).parse().unwrap_or_else(|error| {
            let text = format!("--{name}: {error}");
            if !self.mistakes.iter().any(|mistake| mistake.text == text) {
                self.meaning(text);
            }
            Method::default()
        })
    }
}
