//! `grpc.Health`: whether the agent answers, and which it is.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use protocols::health::health_check_response::ServingStatus;
use protocols::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use protocols::health_ttrpc::{Health, create_health};
use ttrpc::asynchronous::{Service, TtrpcContext};

/// The protocol's version, not the agent's.
const GRPC_VERSION: &str = "0.0.1";

struct HealthService;

pub(super) fn service() -> HashMap<String, Service> {
    create_health(Arc::new(HealthService))
}

#[async_trait]
impl Health for HealthService {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        let mut response = HealthCheckResponse::new();
        response.status = ServingStatus::SERVING.into();
        Ok(response)
    }

    async fn version(
        &self,
        _: &TtrpcContext,
        _: CheckRequest,
    ) -> ttrpc::Result<VersionCheckResponse> {
        let mut response = VersionCheckResponse::new();
        GRPC_VERSION.clone_into(&mut response.grpc_version);
        env!("CARGO_PKG_VERSION").clone_into(&mut response.agent_version);
        Ok(response)
    }
}
