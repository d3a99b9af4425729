//! The metadata service of an instance, version 2: what it is, and any item by its path.

use http::Method;

use super::client::Client;
use super::{Environment, Error};

/// Who is asked, in errors.
pub(super) const SERVICE: &str = "the instance metadata service";
/// Over IPv4, and on instances that have it switched on over IPv6.
const ADDRESSES: [&str; 2] = ["http://169.254.169.254", "http://[fd00:ec2::254]"];

/// What it says of this instance.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    base: String,
    token: String,
    /// Such as `i-0123456789abcdef0`.
    pub instance: String,
    /// Such as `eu-west-1`.
    pub region: String,
    /// Such as `amazonaws.com`.
    pub domain: String,
    /// The first network interface, such as `eni-0123456789abcdef0`.
    pub interface: String,
}

/// Reads it; IPv6 where IPv4 does not answer.
pub(super) async fn read(client: &Client, environment: &Environment) -> Result<Metadata, Error> {
    let given = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT");
    let bases = given.map_or_else(|| ADDRESSES.map(str::to_owned).to_vec(), |base| vec![base]);
    let mut first = None;
    for base in bases {
        let base = base.trim_end_matches('/').to_owned();
        match read_from(client, base).await {
            Err(error @ Error::Unreachable { .. }) => first = first.or(Some(error)),
            outcome => return outcome,
        }
    }
    // There is at least one address, and only its failure leads here.
    Err(first.unwrap_or(Error::Incomplete { what: SERVICE, action: "any".to_owned(), missing: "an address" }))
}

async fn read_from(client: &Client, base: String) -> Result<Metadata, Error> {
    let lifetime = [("x-aws-ec2-metadata-token-ttl-seconds", "300")];
    let token = client.ask(SERVICE, Method::PUT, &format!("{base}/latest/api/token"), &lifetime).await?;
    let mut metadata = Metadata {
        base,
        token,
        instance: String::new(),
        region: String::new(),
        domain: String::new(),
        interface: String::new(),
    };
    metadata.instance = metadata.get(client, "instance-id").await?;
    metadata.region = metadata.get(client, "placement/region").await?;
    metadata.domain = metadata.get(client, "services/domain").await?;
    let mac = metadata.get(client, "mac").await?;
    metadata.interface = metadata.get(client, &format!("network/interfaces/macs/{mac}/interface-id")).await?;
    Ok(metadata)
}

impl Metadata {
    /// One item below `latest/meta-data`.
    pub(super) async fn get(&self, client: &Client, item: &str) -> Result<String, Error> {
        let url = format!("{}/latest/meta-data/{item}", self.base);
        let token = [("x-aws-ec2-metadata-token", self.token.as_str())];
        Ok(client.ask(SERVICE, Method::GET, &url, &token).await?.trim().to_owned())
    }
}
